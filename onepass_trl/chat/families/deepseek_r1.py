"""DeepSeek-R1, its distillations and V3: the template cuts the reasoning from every message.

The prompt ends in ``<｜Assistant｜><think>\\n``, in ``<｜Assistant｜>`` or, behind tool outputs, in
``<｜tool▁outputs▁end｜>``. A completion is
``reasoning\\n</think>\\n\\ncontent<｜end▁of▁sentence｜>``, with the ``<think>\\n`` that the prompt
doesn't hold. Tool calls stand behind the content as the template writes them for the first call of
a conversation; for later ones it leaves out the opening tokens.
"""

from __future__ import annotations

import json
from typing import Any

from onepass_trl.chat.families.base import Family, Turn
from onepass_trl.chat.messages import Message

_ASSISTANT = "<｜Assistant｜>"
_OPENER = "<think>\n"


class DeepSeekR1(Family):
    """The completion is built from the message; the template's rendering has lost the reasoning."""

    name = "deepseek-r1"

    def matches(self, template: str) -> bool:
        """Return whether the template has DeepSeek's tokens and cuts contents at ``</think>``."""
        return _ASSISTANT in template and "content.split('</think>')[-1]" in template

    def prepare(self, message: Message) -> Message:
        """Return the message with tool arguments as JSON text, which the template writes as is."""
        if "tool_calls" not in message:
            return message
        return {**message, "tool_calls": [_with_json_arguments(c) for c in message["tool_calls"]]}

    def completion(self, turn: Turn) -> str:
        """Return reasoning, content and tool calls in the form that the model generates."""
        message = turn.message
        ending = turn.rendered_alone({**message, "content": ""}, _ASSISTANT)
        opened = turn.context.endswith(_OPENER)
        reasoning = message.get("reasoning_content", "").strip("\n")
        if reasoning or opened:
            opener = "" if opened else _OPENER
            return f"{opener}{reasoning}\n</think>\n\n{message['content']}{ending}"
        return message["content"] + ending


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
