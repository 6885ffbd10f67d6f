"""Datasets of conversations to rows: reading them, what their nulls mean, rows, verification.

Nothing here knows of TRL or of a trainer: the tools that run no model prepare data as trainers do.
"""
