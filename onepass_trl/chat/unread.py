"""The parts of a conversation that neither this package nor the chat template reads.

Inference doesn't see them either, so they are no error, but they are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from onepass_trl.chat.checks import written_forms
from onepass_trl.chat.errors import ChatFormatError, TemplateRefusal
from onepass_trl.chat.marks import REASONING_WORDS, words_of
from onepass_trl.chat.messages import REASONING_KEYS, Message
from onepass_trl.chat.template import Template

# `tool_call_id` and `name` go with tool messages, which templates tell apart by their order.
_READ_HERE = {"role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS}
# The words of other names that assistant messages have for what is trained.
_SWITCHES = {"loss", "mask", "masked", "train", "trained", "trainable", "training"}
_CALLS = {"call", "calls", "invocation", "invocations", "use", "uses"}

logger = logging.getLogger(__name__)
# What has been logged: the template, the kind, the name.
_said: set[tuple[str, str, str]] = set()


def check_keys(template: Template, messages: Sequence[Message]) -> None:
    """Log, once for each template, which keys of the messages nobody reads.

    Args:
        template: the text of the chat template.
        messages: in their normal form, without ``train`` flags.

    Raises:
        ChatFormatError: if the name of such a key is one for reasoning, calls or a loss switch:
            the turn would be trained without it.
    """
    unread = set()
    for index, message in enumerate(messages):
        for key in message.keys() - _READ_HERE:
            if message[key] in ("", [], {}) or template.reads(key):
                continue
            remedy = _remedy(key, message[key]) if message["role"] == "assistant" else None
            if remedy:
                raise ChatFormatError(
                    f"message {index} has {key!r}, which neither this package nor the chat "
                    f"template reads; {remedy}, or remove it"
                )
            unread.add(key)
    new = sorted(key for key in unread if _is_new(template.text, "key", key))
    if new:
        logger.warning(
            "messages have %s, which neither this package nor the chat template reads, so it "
            "changes nothing. Reasoning is read from %s; 'train': false switches a turn off",
            ", ".join(map(repr, new)),
            ", ".join(REASONING_KEYS),
        )


def _remedy(key: str, value: Any) -> str | None:
    """Return what to do if the key means something for training, None if it doesn't."""
    words = words_of(key)
    if words & _SWITCHES:
        return "rename it to 'train' (true or false), if it says whether the turn is trained"
    if isinstance(value, (bool, int, float)):  # how many tokens, calls or seconds there were
        return None
    if words & REASONING_WORDS:
        return "rename it to 'reasoning_content', if it is the turn's reasoning"
    if words & _CALLS:
        return "give it as 'tool_calls', if the turn calls tools"
    return None


def report_left_out(
    template: Template, messages: Sequence[Message], prepared: Sequence[Message], context: str
) -> None:
    """Log, once for each template and role, which messages and tools a context lacks.

    Args:
        template: the text of the chat template.
        messages: those before a turn, in their normal form.
        prepared: the same, as the template takes them.
        context: what the template writes for them.
    """
    _report_tools(template)
    missing = [
        index
        for index, message in enumerate(messages)
        if message["role"] != "assistant"
        and message["content"].strip()
        and not any(form in context for form in written_forms(message["content"]))
    ]
    if not missing:
        return
    # Templates may also change a text. One that no template changes shows whether there is a place.
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
        role = messages[index]["role"]
        if text not in written and _is_new(template.text, "role", role):
            logger.warning(
                "this chat template leaves out a message with role %r (message %d): neither "
                "training nor inference sees it. Give it a role or a place that the template "
                "writes, such as the first system message",
                role,
                index,
            )


def _report_tools(template: Template) -> None:
    """Log, once for each template, that it reads no tools, or that servers give them otherwise."""
    if not template.tools:
        return
    if not template.names("tools"):
        if _is_new(template.text, "tools", ""):
            logger.warning(
                "a conversation has tools, but this chat template doesn't read tools: neither "
                "training nor inference sees them. Use a template that writes them, or put them "
                "into the system message"
            )
        return
    for tool in template.tools:
        served = not isinstance(tool, Mapping) or (
            tool.get("type") == "function" and isinstance(tool.get("function"), Mapping)
        )
        if not served and _is_new(template.text, "tools", "form"):
            logger.warning(
                "a conversation has a tool with the keys %s. Servers give templates {'type': "
                "'function', 'function': {'name': .., 'parameters': ..}}, so inference may see "
                "another text: give tools in that form",
                ", ".join(map(repr, tool)),
            )


def _is_new(template: str, kind: str, name: str) -> bool:
    """Return whether this hasn't been logged yet, and record that it has."""
    new = (template, kind, name) not in _said
    _said.add((template, kind, name))
    return new
