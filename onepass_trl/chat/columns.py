"""The columns of a record that aren't read: an error where one may change what is trained."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.marks import REASONING_WORDS, words_of

logger = logging.getLogger(__name__)

EMPTY: tuple[Any, ...] = (None, "", "null", "[]", "{}", [], {}, ())
"""Values of columns that hold nothing, as Python or as JSON text."""

# Words of columns that describe what another one holds: `thinking_tokens`, `system_prompt_id`.
_ABOUT = words_of(
    "category count counts date difficulty hash id ids lang language len length license model name "
    "names num number quality score scores seconds source split time tokens type types url version"
)
_SWITCHES = words_of("loss mask masked masks train trainable trained")
_WEIGHTS = words_of("weight weights")
_THINKING = REASONING_WORDS | {"effort"}
_TOOLS = words_of("function functions tool tools")
_CONTEXT = words_of("documents history")
_SYSTEM = words_of("developer sys system")
_PROMPTS = words_of("content custom instruction instructions message msg prompt text")

_said: set[str] = set()  # the columns that have been logged


def check_columns(
    record: Mapping[str, Any],
    read: Collection[str],
    messages: Sequence[Mapping[str, Any]] | None,
    *,
    is_whole: bool = False,
) -> None:
    """Log, once for each name, which columns of a record aren't read.

    Args:
        record: As plain Python; values may be JSON text.
        read: The columns that are read.
        messages: Its messages, None if it holds text or token ids.
        is_whole: Whether nothing can be missing in what the model sees: plain text, token ids.

    Raises:
        ChatFormatError: for a column whose name says that it changes what is trained (a loss mask,
            weights) or what is seen: reasoning and its switches, tools, a system prompt.

    >>> check_columns({"messages": [], "id": 3, "loss_mask": [0, 1]}, ["messages"], [])
    Traceback (most recent call last):
    onepass_trl.chat.errors.ChatFormatError: the row has a column 'loss_mask', which isn't read. \
If it says what is trained, give messages 'train' (true or false); if it changes nothing, name it \
in the option ignored_columns
    """
    unread = [name for name, value in record.items() if name not in read and value not in EMPTY]
    for name in unread:
        words, value = words_of(name), record[name]
        if words & _ABOUT:
            continue
        remedy = _trained(words, value, messages)
        if not (remedy or is_whole):
            remedy = _seen(words, value, record, messages)
        if remedy:
            raise ChatFormatError(
                f"the row has a column {name!r}, which isn't read. {remedy}; if it changes "
                "nothing, name it in the option ignored_columns"
            )
    new = sorted(set(unread) - _said)
    if new:
        _said.update(new)
        logger.warning("rows have columns that aren't read: %s", ", ".join(map(repr, new)))


def _trained(words: set[str], value: Any, messages: Sequence[Any] | None) -> str | None:
    """Return what to do with a column that may say what is trained, None for others."""
    number = _number(value)
    if words & _SWITCHES and number in (None, 0, 1):
        if messages is None:
            return "If it says what is trained, give token ids with 'labels', -100 for those not"
        return "If it says what is trained, give messages 'train' (true or false)"
    if words & _WEIGHTS and number != 1:
        return "All turns count alike: leave out those that shouldn't count"
    return None


def _seen(
    words: set[str],
    value: Any,
    record: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]] | None,
) -> str | None:
    """Return what to do with a column that may say what the model sees, None for others."""
    if words == {"label"} and str(value).lower() == "false":  # of trl's KTO
        return "If it says that the answer is a bad one, remove the row"
    if not isinstance(value, bool) and _number(value) is not None:
        return None
    is_list = isinstance(value, (Mapping, list, tuple)) or str(value).lstrip()[:1] in ("[", "{")
    is_system = words & _SYSTEM and words <= _SYSTEM | _PROMPTS
    if words & _THINKING:
        place = (
            "as 'reasoning_content' of its message, or in the column 'chat_template_kwargs' if it "
            "is a switch that the chat template reads"
        )
    elif words & _TOOLS and is_list and (messages is None or not record.get("tools")):
        place = "in the column 'tools'"
    elif words & _CONTEXT and is_list:
        place = (
            "in the messages, or in the column 'chat_template_kwargs' if the chat template reads it"
        )
    elif is_system and not any(message.get("content") == value for message in messages or ()):
        place = "in the column 'system'"
    else:
        return None
    return f"Give it {place if messages is not None else 'in the prompt'}"


def _number(value: Any) -> float | None:
    """Return the number that a value is, also as text; None if it is none."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None
