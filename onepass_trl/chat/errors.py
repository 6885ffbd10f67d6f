"""The error that this package raises for its input, and what becomes one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

TOO_DEEP = "it is nested too deep to be read: make it flatter, or give what is deep as text"


class ChatFormatError(ValueError):
    """A conversation, a record or a chat template from which exact passes can't be made."""


class TurnError(Exception):
    """What is wrong with a turn; rendering makes it a ChatFormatError that names the turn."""


class TemplateRefusal(TurnError):
    """The error that a template raises for the messages up to a turn."""


@contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Put a name before the texts of errors about what is done here: what they are about.

    >>> with errors_named("completion 1 of 2"):
    ...     raise ChatFormatError("it is empty")
    Traceback (most recent call last):
    onepass_trl.chat.errors.ChatFormatError: completion 1 of 2: it is empty
    """
    try:
        yield
    except ChatFormatError as error:
        raise ChatFormatError(f"{name}: {error}") from error
