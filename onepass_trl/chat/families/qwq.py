"""QwQ and other templates that cut contents at ``</think>`` and read no field of reasoning.

The prompt ends in ``<|im_start|>assistant\\n<think>\\n``, or in other templates of the kind without
the opener. A completion is ``reasoning\\n</think>\\n\\ncontent<|im_end|>``, with the ``<think>\\n``
that the prompt doesn't hold.
"""

from __future__ import annotations

import re

from onepass_trl.chat.families.base import Turn
from onepass_trl.chat.families.composable import Composable
from onepass_trl.chat.families.fenced import Fenced

_CUT = re.compile(r"""\.split\((['"])</think>\1""")


class Qwq(Fenced):
    """The reasoning stands between ``<think>`` and ``</think>``, where templates never write it."""

    name = "qwq"

    def matches(self, template: str) -> bool:
        """Return whether the template cuts contents at ``</think>`` and reads no reasoning."""
        return _CUT.search(template) is not None and not Composable().reads_reasoning(template)

    def fence(self, turn: Turn) -> tuple[str, str]:
        """Return the marks with the line ends that the models write."""
        return "<think>\n", "\n</think>\n\n"

    def rest(self, turn: Turn) -> str:
        """Return what the template writes behind the prompt for a turn without reasoning."""
        prompt = turn.template.question_prompt.removeprefix(turn.template.question)
        return turn.rendered_alone(prompt.removesuffix(self.fence(turn)[0]))

    def completion(self, turn: Turn) -> str:
        """Return the turn, with the line breaks of the fence alone around its reasoning."""
        return super().completion(turn.with_reasoning(turn.reasoning.strip("\n")))
