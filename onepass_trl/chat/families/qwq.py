"""QwQ and other templates that cut contents at ``</think>`` and read no field of reasoning.

The prompt ends in ``<|im_start|>assistant\\n<think>\\n``, or in other templates of the kind without
the opener. A completion is ``reasoning\\n</think>\\n\\ncontent<|im_end|>``, with the ``<think>\\n``
that the prompt doesn't hold. Nemotron Nano v2's template writes the opener in the last turn too,
and no reasoning after it. Templates whose prompts end in ``<think>`` alone have no line ends
around the closing mark either.
"""

from __future__ import annotations

import re

from onepass_trl.chat.families.base import Turn
from onepass_trl.chat.families.fenced import Fenced
from onepass_trl.chat.template import Template

_CONTENT = "stand-in for content"
_FENCE = re.compile(r"<think>\s*(</think>\s*)?")
_FENCE_AT_END = re.compile(rf"({_FENCE.pattern})?\Z")


class Qwq(Fenced):
    """The reasoning is between ``<think>`` and ``</think>``, where templates never write it."""

    name = "qwq"

    def matches(self, template: Template) -> bool:
        """Return whether the template cuts contents at ``</think>`` and reads no reasoning."""
        return not template.reads_reasoning and template.cuts_reasoning

    def fence(self, turn: Turn) -> tuple[str, str]:
        """Return the marks with the line ends that the models write, if the prompt has them."""
        if turn.template.question_prompt.endswith(("<think>", "</think>")):
            return "<think>", "</think>"
        return "<think>\n", "\n</think>\n\n"

    def rest(self, turn: Turn) -> str:
        """Return what the template writes for a turn without reasoning, after header and fence."""
        header = _FENCE_AT_END.sub("", turn.template.question_prompt)
        before, _, _ = turn.with_content(_CONTENT).rendered_alone(header).partition(_CONTENT)
        return turn.rendered_alone(header + (before if _FENCE.fullmatch(before) else ""))

    def completion(self, turn: Turn) -> str:
        """Return the turn, with the line breaks of the fence alone around its reasoning."""
        return super().completion(turn.with_reasoning(turn.reasoning.strip("\n")))
