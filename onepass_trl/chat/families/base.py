"""What a template family says: how its messages are prepared, what a turn's completion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.messages import THINK_OPEN, Message
from onepass_trl.chat.template import Template


@dataclass(frozen=True)
class Turn:
    """One assistant turn as a family sees it.

    Attributes:
        template: The chat template.
        messages: The prepared messages up to and including the turn's own.
        context: The text that inference would feed before the turn: the messages before it and the
            prompt.
    """

    template: Template
    messages: Sequence[Message]
    context: str

    @property
    def message(self) -> Message:
        """The turn's own message."""
        return self.messages[-1]

    def rendered_alone(self, message: Message, header: str) -> str:
        """Return what the template writes behind an empty question and the header of its answer.

        Raises:
            TurnError: if that rendering doesn't begin with the question and the header.
        """
        question: list[Message] = [{"role": "user", "content": ""}]
        begin = self.template.render(question, prompt=False) + header
        alone = self.template.render([*question, message], prompt=False)
        if not alone.startswith(begin):
            raise TurnError(f"the template doesn't write {header!r} before an assistant message")
        return alone[len(begin) :]


class Family(ABC):
    """A family of chat templates, known by the template's own text.

    Attributes:
        name: Name of the family, for error messages.
        remedies: What to do about an error that the template raises, by a part of the error's text.
        thinking_opener: The text with which the reasoning of a turn begins, in its context or its
            completion, where the template has reasoning at all.
    """

    name: ClassVar[str]
    remedies: ClassVar[Mapping[str, str]] = {}
    thinking_opener: ClassVar[str] = THINK_OPEN

    @abstractmethod
    def matches(self, template: str) -> bool:
        """Return whether the template, given as its Jinja source, belongs to this family."""

    def reads_reasoning(self, template: str) -> bool:
        """Return whether turns of this template have reasoning apart from their content."""
        return True

    def prepare(self, message: Message) -> Message:
        """Return the normalized message as this family's templates want it."""
        return message

    @abstractmethod
    def completion(self, turn: Turn) -> str:
        """Return what the model must generate behind ``turn.context``; white space may follow.

        Raises:
            TurnError: if there is no such text for this turn.
        """
