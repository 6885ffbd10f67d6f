"""Templates that cut the reasoning from messages: the completion is put together.

What the template writes for the message without its reasoning stays as it is. Before it comes the
reasoning between the marks that the model was taught, of which the prompt may already hold the
first.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from onepass_trl.chat.families.base import Family, Turn


class Fenced(Family):
    """The completion is the reasoning in its fence, and what the template writes for the rest.

    Attributes:
        header: What the template writes between a question and its answer.
    """

    header: ClassVar[str]

    @abstractmethod
    def fence(self, turn: Turn) -> tuple[str, str]:
        """Return what opens and what closes the reasoning of a turn."""

    def rest(self, turn: Turn) -> str:
        """Return what the template writes for a turn without reasoning, after the header."""
        return turn.rendered_alone(turn.template.question + self.header)

    def completion(self, turn: Turn) -> str:
        """Return reasoning, content and tool calls in the form that the model generates.

        A turn without reasoning closes the fence where its prompt opens it, and has none elsewhere.
        """
        opener, closer = self.fence(turn)
        rest = self.rest(turn.with_reasoning(""))
        if turn.ends_prompt(opener):
            return turn.reasoning + closer + rest
        if turn.ends_prompt(closer):
            turn.refuse_reasoning()
        return (opener + turn.reasoning + closer if turn.reasoning else "") + rest
