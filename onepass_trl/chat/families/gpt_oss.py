"""gpt-oss (harmony): a turn is one or more messages in channels.

The prompt ends in ``<|start|>assistant``. After it come the reasoning, as
``<|channel|>analysis<|message|>reasoning<|end|><|start|>assistant``, and then the answer, as
``<|channel|>final<|message|>content<|return|>``, or a tool call, as
`` to=functions.name<|channel|>commentary json<|message|>{..}<|call|>``.

The template writes it so, but drops the analysis of earlier tool calls as soon as the last turn is
an answer: then the conversation doesn't begin with the turn's context. So a turn is rendered alone;
what the template writes for it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.families.base import SPLIT_CALLS, Family, Turn
from onepass_trl.chat.template import Template

_HEADER = "<|start|>assistant"


class GptOss(Family):
    """The completion is what the template writes for the turn after an empty question."""

    name = "gpt-oss"
    thinking_opener = "<|channel|>analysis<|message|>"
    remedies: ClassVar[Mapping[str, str]] = {
        "both content and thinking": (
            "gpt-oss has one place for text before a tool call, that of reasoning: join content "
            "and reasoning of that message in its 'reasoning_content'"
        ),
        "no previous assistant message with a tool call": (
            "put the assistant message with the tool call before each tool message"
        ),
        "<|channel|> tags": (
            "put the reasoning into 'reasoning_content' and the answer into 'content'"
        ),
    }

    def matches(self, template: Template) -> bool:
        """Return whether the template writes harmony's channels."""
        return all(
            f"{_HEADER}<|channel|>{name}<|message|>" in template.text
            for name in ("analysis", "final")
        )

    def completion(self, turn: Turn) -> str:
        """Return the turn's channels, through ``<|return|>`` or ``<|call|>``."""
        calls = len(turn.message.get("tool_calls", ()))
        if calls > 1:
            raise TurnError(
                f"it has {calls} tool calls, of which the gpt-oss template writes only the first; "
                f"{SPLIT_CALLS}"
            )
        if calls and turn.message["content"].strip() and not turn.reasoning:
            raise TurnError(
                "it has text with a tool call, which the gpt-oss template writes where reasoning "
                "is: if it is to be generated there, give it as 'reasoning_content', else remove it"
            )
        return turn.rendered_alone(turn.template.question + _HEADER)
