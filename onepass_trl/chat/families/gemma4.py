"""Gemma 4: the template writes the reasoning of some messages, of most it writes none.

The prompt ends in ``<|turn>model\\n``, or after a tool response in ``<tool_response|>``, to which
the newest template adds ``<|channel>thought\\n``. A completion is
``<|channel>thought\\nreasoning\\n<channel|>content<turn|>``, or with tool calls
``..<|tool_call>call:name{..}<tool_call|><|tool_response>``. Content next to tool calls follows
them, where the template writes it.
"""

from __future__ import annotations

from typing import ClassVar

from onepass_trl.chat.families.base import Turn
from onepass_trl.chat.families.fenced import Fenced
from onepass_trl.chat.template import Template


class Gemma4(Fenced):
    """The reasoning is in the channel ``thought``."""

    name = "gemma-4"
    thinking_opener = "<|channel>thought"
    header: ClassVar[str] = "<|turn>model\n"

    def matches(self, template: Template) -> bool:
        """Return whether the template writes Gemma's turns and knows its channels."""
        return "<|turn>" in template.text and "<|channel>" in template.text

    def fence(self, turn: Turn) -> tuple[str, str]:
        """Return the marks of the channel."""
        return "<|channel>thought\n", "\n<channel|>"
