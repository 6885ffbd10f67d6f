"""The marks that close the fields of a turn: a field that holds its own would be misread."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onepass_trl.chat.checks import written_forms
from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.messages import Message

_TAG = re.compile(r"<[^<>\s]+>")
_QUOTES = ("'", '"')


@dataclass(frozen=True)
class ClosingMarks:
    """How a template closes the fields of turns of one shape.

    Attributes:
        reasoning: The tag that comes next after the reasoning, ``""`` if none does.
        content: The tag that comes next after the content.
        arguments: What comes after the last argument of the last call: the quotation mark next to
            it, and the tags that close the argument, its call and all calls.
    """

    reasoning: str
    content: str
    arguments: frozenset[str]

    @classmethod
    def of(cls, completion: str, texts: Mapping[str, str]) -> ClosingMarks:
        """Return the marks in what the template writes for a message of other texts.

        Args:
            completion: What it writes for the message.
            texts: The texts of :func:`onepass_trl.chat.checks.with_stand_ins` in it.

        >>> texts = {"its content": "No.", "the value of an argument of its tool call 0": "28"}
        >>> marks = ClosingMarks.of("<say>No.</say><call>f(days='28')</call><|end|>", texts)
        >>> marks.content, sorted(marks.arguments)
        ('</say>', ["'", '</call>', '<|end|>'])
        """
        after = {
            what: _up_to(completion.rpartition(text)[2], texts) for what, text in texts.items()
        }
        values = [rest for what, rest in after.items() if what.startswith("the value")]
        last = values[-1] if values else ""
        return cls(
            reasoning=_next_tag(after.get("its reasoning", "")),
            content=_next_tag(after.get("its content", "")),
            arguments=frozenset([*_TAG.findall(last), *(q for q in _QUOTES if last.startswith(q))]),
        )

    def check(self, message: Message, completion: str) -> None:
        """Check that no field of a message holds what closes it.

        Args:
            message: The turn's message in its normal form.
            completion: What the template writes for it. Quotation marks count if it has the
                arguments as they are, not escaped.

        Raises:
            TurnError: if one does.
        """
        for field, mark in self._held(message, completion):
            raise TurnError(
                f"its {field} contains {mark!r}, with which this template closes it, so it would "
                "be misread when it is generated; remove it from the text, use a template that "
                "closes it otherwise, or switch the turn off with 'train': false"
            )

    def _held(self, message: Message, completion: str) -> Iterator[tuple[str, str]]:
        """Yield what fields with their own marks are called, and the mark."""
        for field, mark in (("reasoning_content", self.reasoning), ("content", self.content)):
            if mark and mark in message.get(field, ""):
                yield field, mark
        for number, call in enumerate(message.get("tool_calls", ())):
            arguments = call["function"]["arguments"]
            written = json.dumps(arguments, ensure_ascii=False)
            for mark in sorted(self.arguments):
                if (
                    _is_unescaped(mark, arguments, completion)
                    if mark in _QUOTES
                    else mark in written
                ):
                    yield f"tool call {number}", mark


def _up_to(text: str, texts: Mapping[str, str]) -> str:
    """Return the text before the first of others."""
    return min((text.partition(other)[0] for other in texts.values()), key=len)


def _next_tag(text: str) -> str:
    found = _TAG.match(text.lstrip())
    return found.group() if found else ""


def _is_unescaped(quote: str, arguments: Mapping[str, Any], completion: str) -> bool:
    """Return whether an argument with this quotation mark is written as it is, not escaped.

    It may also be between such marks elsewhere, for instance in reasoning that quotes it.
    """
    for value in arguments.values():
        if not isinstance(value, str) or quote not in value:
            continue
        forms = {value, *written_forms(value)}
        written = {form for form in forms if quote + form + quote in completion}
        if written and written <= {value, value.strip()}:
            return True
    return False
