"""DeepSeek-R1, its distillations, V3 and V3.1: the template cuts the reasoning from every message.

The prompt ends in ``<｜Assistant｜><think>\\n``, in ``<｜Assistant｜>`` or, after tool outputs, in
``<｜tool▁outputs▁end｜>``. A completion is
``reasoning\\n</think>\\n\\ncontent<｜end▁of▁sentence｜>``, with the ``<think>\\n`` that the prompt
doesn't hold. Templates with a switch (V3.1) end the prompt in ``<think>`` or ``</think>``; their
completion is ``reasoning</think>content<｜end▁of▁sentence｜>`` or the content alone. Tool calls
follow the content as the template writes them for the first call of a conversation; for later
ones it may leave out the opening tokens.
"""

from __future__ import annotations

from typing import ClassVar

from onepass_trl.chat.families.base import Turn
from onepass_trl.chat.families.qwq import Qwq
from onepass_trl.chat.template import Template


class DeepSeek(Qwq):
    """The reasoning is between ``<think>`` and ``</think>``, where templates never write it."""

    name = "deepseek"
    header: ClassVar[str] = "<｜Assistant｜>"

    def matches(self, template: Template) -> bool:
        """Return whether the template has DeepSeek's tokens and cuts contents at ``</think>``."""
        return self.header in template.text and super().matches(template)

    def rest(self, turn: Turn) -> str:
        """Return the content as it is, since the template may cut it, and what follows it."""
        after = turn.with_content("").rendered_alone(turn.template.question + self.header)
        return turn.message["content"] + after.removeprefix("</think>")  # V3.1's empty fence
