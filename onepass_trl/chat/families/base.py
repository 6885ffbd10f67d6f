"""What a template family says: which templates are its own, what a turn's completion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.marks import THINK_OPEN
from onepass_trl.chat.messages import REASONING_KEYS, Message
from onepass_trl.chat.template import Template

SPLIT_CALLS = "split it into one assistant message for each call, each followed by its tool message"


@dataclass(frozen=True)
class Turn:
    """One assistant turn as a family sees it.

    Attributes:
        template: The chat template.
        messages: The messages, as the template takes them, up to and including the turn's own.
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

    @property
    def reasoning(self) -> str:
        """The message's reasoning, ``""`` if it has none."""
        return self.message.get("reasoning_content", "")

    def with_content(self, content: str) -> Turn:
        """Return the turn with another content, as a list of parts if it is one now."""
        given: Any = content
        if isinstance(self.message["content"], list):
            given = [{"type": "text", "text": content}]
        return replace(self, messages=[*self.messages[:-1], {**self.message, "content": given}])

    def with_reasoning(self, reasoning: str) -> Turn:
        """Return the turn with another reasoning, ``""`` for none."""
        message = {k: v for k, v in self.message.items() if k not in REASONING_KEYS}
        if reasoning:
            message.update(dict.fromkeys(REASONING_KEYS, reasoning))
        return replace(self, messages=[*self.messages[:-1], message])

    def ends_prompt(self, mark: str) -> bool:
        """Return whether the prompt of the turn ends in this mark, white space aside."""
        return self.context.rstrip().endswith(mark.strip())

    def rendered_alone(self, before: str) -> str:
        """Return what the template writes for the turn as the answer to an empty question.

        Args:
            before: The text of the question and of the header of its answer.

        Raises:
            TurnError: if that rendering doesn't begin with this text.
        """
        alone = self.template.render_after_question(self.message)
        if not alone.startswith(before):
            raise TurnError(
                f"the template doesn't write {before[-40:]!r} before an assistant message"
            )
        return alone[len(before) :]

    def refuse_reasoning(self) -> None:
        """Raise an error if the turn has reasoning: its prompt says that there is none.

        Raises:
            TurnError: if the turn has reasoning.
        """
        if not self.reasoning:
            return
        switch = self.template.thinking_switch
        remedy = f"set chat_template_kwargs to {{{switch!r}: True}}, for this row or for all, or "
        raise TurnError(
            f"it has reasoning, but the prompt before it, which ends in {self.context[-40:]!r}, "
            f"says that there is none; {remedy if switch else ''}remove the reasoning"
        )


class Family(ABC):
    """A family of chat templates, known by what the template writes.

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
    def matches(self, template: Template) -> bool:
        """Return whether the template, whose Jinja source is its ``text``, is of this family."""

    def reads_reasoning(self, template: Template) -> bool:
        """Return whether turns of this template have reasoning apart from their content."""
        return True

    @abstractmethod
    def completion(self, turn: Turn) -> str:
        """Return what the model must generate after ``turn.context``; white space may follow.

        Raises:
            TurnError: if there is no such text for this turn.
        """
