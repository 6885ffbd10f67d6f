"""Turns that are stored in several messages: what the assistant says at once is one turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from onepass_trl.chat.messages import Message


class Joined(NamedTuple):
    """A message, and the indices of those that it was joined from."""

    message: Message
    indices: range


def join_turns(messages: Sequence[Message]) -> list[Joined]:
    """Return the messages, those joined that are parts of one turn.

    A thought and what comes after it, and anything and the calls after it: ShareGPT's ``gpt`` and
    ``function_call``. Parts of which only some are trained by their ``train`` flags stay apart.

    Args:
        messages: in their normal form.

    >>> call = {"function": {"name": "add", "arguments": {}}}
    >>> parts = [{"content": "I add.", "reasoning_content": "Hm."}, {"tool_calls": [call]}]
    >>> [turn] = join_turns([{"role": "assistant", "content": ""} | part for part in parts])
    >>> sorted(turn.message), turn.indices
    (['content', 'reasoning_content', 'role', 'tool_calls'], range(0, 2))
    """
    joined: list[Joined] = []
    for index, message in enumerate(messages):
        if joined and _goes_on(joined[-1].message, message):
            last = joined.pop()
            joined.append(Joined(_join(last.message, message), range(last.indices[0], index + 1)))
        else:
            joined.append(Joined(message, range(index, index + 1)))
    return joined


def _goes_on(first: Message, second: Message) -> bool:
    if first["role"] != "assistant" or second["role"] != "assistant":
        return False
    if first.get("train", True) != second.get("train", True) or "reasoning_content" in second:
        return False
    is_thought = "reasoning_content" in first and not (first["content"] or "tool_calls" in first)
    return is_thought or ("tool_calls" in second and not second["content"])


def _join(first: Message, second: Message) -> Message:
    joined = {**first, **second, "content": first["content"] or second["content"]}
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    return {**joined, "tool_calls": calls} if calls else joined
