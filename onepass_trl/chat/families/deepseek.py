"""DeepSeek-R1, its distillations, V3 and V3.1: the template cuts the reasoning from every message.

The prompt ends in ``<｜Assistant｜><think>\\n``, in ``<｜Assistant｜>`` or, behind tool outputs, in
``<｜tool▁outputs▁end｜>``. A completion is
``reasoning\\n</think>\\n\\ncontent<｜end▁of▁sentence｜>``, with the ``<think>\\n`` that the prompt
doesn't hold. Templates with a switch (V3.1) end the prompt in ``<think>`` or ``</think>``; their
completion is ``reasoning</think>content<｜end▁of▁sentence｜>`` or the content alone. Tool calls
stand behind the content as the template writes them for the first call of a conversation; for later
ones it may leave out the opening tokens.
"""

from __future__ import annotations

from typing import ClassVar

from onepass_trl.chat.families.base import Turn
from onepass_trl.chat.families.fenced import Fenced


class DeepSeek(Fenced):
    """The reasoning stands between ``<think>`` and ``</think>``, where templates never write it."""

    name = "deepseek"
    header: ClassVar[str] = "<｜Assistant｜>"

    def matches(self, template: str) -> bool:
        """Return whether the template has DeepSeek's tokens and cuts contents at ``</think>``."""
        return self.header in template and "content.split('</think>'" in template

    def fence(self, turn: Turn) -> tuple[str, str]:
        """Return the marks, without line ends where the template's own prompt has none."""
        if turn.template.question_prompt.endswith(("<think>", "</think>")):
            return "<think>", "</think>"
        return "<think>\n", "\n</think>\n\n"

    def rest(self, turn: Turn) -> str:
        """Return the content as it is, since the template may cut it, and what stands behind it."""
        behind = super().rest(turn.with_content(""))
        return turn.message["content"] + behind.removeprefix("</think>")  # V3.1's empty fence

    def completion(self, turn: Turn) -> str:
        """Return the turn, with the line breaks of the fence alone around its reasoning."""
        return super().completion(turn.with_reasoning(turn.reasoning.strip("\n")))
