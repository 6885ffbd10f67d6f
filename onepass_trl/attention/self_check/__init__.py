"""Kernels prove themselves on a device that no test has seen: a check at their first use.

`cases` are rows that kernels get wrong first, `comparison` finds a mistake in what is computed of
them, and ``python -m onepass_trl.attention.self_check`` does both. `process` runs that in a process
of its own, `verdicts` remembers what came of it, and `decision` says whether "auto" takes a kernel.
"""
