"""What of a conversation neither this package nor the chat template reads.

Inference doesn't see it either, so it's no error; but nobody wants it lost without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache

from onepass_trl.chat.checks import written_forms
from onepass_trl.chat.errors import ChatFormatError, TemplateRefusal
from onepass_trl.chat.messages import REASONING_KEYS, Message
from onepass_trl.chat.template import Template

# `tool_call_id` and `name` go with tool messages, which templates tell apart by their order.
_READ_HERE = {"role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS}
_RENAMED: Mapping[str, str] = {
    **dict.fromkeys(
        ("thought", "thoughts", "think", "thinking_content", "reasoning_text", "reason", "cot"),
        "'reasoning_content', if it is the turn's reasoning",
    ),
    **dict.fromkeys(("loss", "trainable"), "'train', which says whether the turn is trained"),
}

logger = logging.getLogger(__name__)


def check_keys(template: Template, messages: Sequence[Message]) -> None:
    """Log, once for each template, which keys of the messages nobody reads.

    Args:
        template: The chat template.
        messages: The messages in their normal form, without ``train`` flags.

    Raises:
        ChatFormatError: if such a key is a known name for reasoning or for the ``train`` flag:
            without it, something else would be trained.
    """
    unread = set()
    for index, message in enumerate(messages):
        for key in message.keys() - _READ_HERE:
            if template.names(key):
                continue
            if key in _RENAMED and message["role"] == "assistant" and message[key] != "":
                raise ChatFormatError(
                    f"message {index} has {key!r}, which neither this package nor the chat "
                    f"template reads; rename it to {_RENAMED[key]}, or remove it"
                )
            unread.add(key)
    if unread:
        _report_keys(template.text, tuple(sorted(unread)))


def report_left_out(
    template: Template, messages: Sequence[Message], prepared: Sequence[Message], context: str
) -> None:
    """Log, once for each template and role, which messages and tools a context lacks.

    Args:
        template: The chat template.
        messages: The messages before a turn, in their normal form.
        prepared: The same, as the template takes them.
        context: What the template writes for them.
    """
    if template.tools and not template.names("tools"):
        _report_tools(template.text)
    missing = [
        index
        for index, message in enumerate(messages)
        if message["role"] != "assistant"
        and message["content"].strip()
        and not any(form in context for form in written_forms(message["content"]))
    ]
    if not missing:
        return
    # Templates may change a text, too. A text that none changes shows whether there is a place.
    stand_ins = {index: f"stand-in for content {index}" for index in missing}
    other = [
        {**message, "content": stand_ins.get(index, message["content"])}
        for index, message in enumerate(prepared)
    ]
    try:
        written = template.render(other, prompt=True)
    except TemplateRefusal:
        return  # it reads the text, and takes no other
    for index, text in stand_ins.items():
        if text not in written:
            _report_message(template.text, messages[index]["role"], index)


@lru_cache(maxsize=64)
def _report_keys(template: str, keys: tuple[str, ...]) -> None:
    logger.warning(
        "messages have %s, which neither this package nor the chat template reads, so it changes "
        "nothing. Reasoning is read from %s; 'train': false switches a turn off",
        ", ".join(map(repr, keys)),
        ", ".join(REASONING_KEYS),
    )


@lru_cache(maxsize=16)
def _report_tools(template: str) -> None:
    logger.warning(
        "a conversation has tools, but this chat template doesn't read tools: neither training "
        "nor inference sees them. Use a template that writes them, or put them into the system "
        "message"
    )


# The index is part of the message, but not of what is said once.
_reported: set[tuple[str, str]] = set()


def _report_message(template: str, role: str, index: int) -> None:
    if (template, role) in _reported:
        return
    _reported.add((template, role))
    logger.warning(
        "this chat template leaves out a message with role %r (message %d): neither training nor "
        "inference sees it. Give it a role or a place that the template writes, such as the first "
        "system message",
        role,
        index,
    )
