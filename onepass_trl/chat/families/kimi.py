"""Kimi K2 Thinking and K2.5: an answer drops the reasoning of the calls before it, and its own.

The prompt ends in ``<|im_assistant|>assistant<|im_middle|>``, in K2.5 with ``<think>`` after it. A
completion is ``<think>reasoning</think>content<|im_end|>``, or with tool calls
``..<|tool_calls_section_begin|><|tool_call_begin|>functions.name:0..<|im_end|>``.

The template writes calls so, but keeps reasoning only after the last answer. So a turn is rendered
alone, and an answer's reasoning put into the fence that the template leaves empty.
"""

from __future__ import annotations

from onepass_trl.chat.families.base import Family, Turn
from onepass_trl.chat.marks import THINK_CLOSE, THINK_OPEN
from onepass_trl.chat.template import Template


class Kimi(Family):
    """The completion is what the template writes after an empty question, with the reasoning."""

    name = "kimi-k2"

    def matches(self, template: Template) -> bool:
        """Return whether the template has Kimi's tokens and fences reasoning."""
        return all(text in template.text for text in ("<|im_middle|>", THINK_OPEN, THINK_CLOSE))

    def completion(self, turn: Turn) -> str:
        """Return reasoning, content and tool calls, without the opener that the prompt holds."""
        if turn.ends_prompt(THINK_CLOSE):
            turn.refuse_reasoning()
        opener = "" if turn.ends_prompt(THINK_OPEN) else THINK_OPEN
        alone = turn.rendered_alone(turn.template.question_prompt)
        empty = opener + THINK_CLOSE
        if turn.reasoning and alone.startswith(empty):
            return opener + turn.reasoning + THINK_CLOSE + alone.removeprefix(empty)
        return alone
