"""The error that this package raises for its input, and what becomes one."""

from __future__ import annotations


class ChatFormatError(ValueError):
    """A conversation, a dataset row or a chat template from which exact passes can't be made."""


class TurnError(Exception):
    """What is wrong with a turn; rendering makes it a ChatFormatError that names the turn."""


class TemplateRefusal(TurnError):
    """The error that a template raises for the messages up to a turn."""
