"""Checks on a turn's completion: all that the message holds is in it, and it ends as it should."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.messages import THINK_CLOSE, Message


def check_generable(message: Message, special: re.Pattern[str] | None, template: str) -> None:
    """Check that generation could produce this message: nothing in it ends the turn early.

    Raises:
        TurnError: if the message's own text holds a special token, or a ``</think>`` that the
            model's output would be cut at.
    """
    for field, text in _texts(message):
        found = special.search(text) if special else None
        if found:
            raise TurnError(
                f"its {field} contains the special token {found.group()!r}, at which generation "
                "would end or be misread; remove it from the text or switch the turn off with "
                "'train': false"
            )
    if THINK_CLOSE in template:
        field = "reasoning_content" if "reasoning_content" in message else "content"
        if THINK_CLOSE in message[field]:
            raise TurnError(
                f"its {field} contains {THINK_CLOSE!r}, where the reasoning would end when it is "
                "generated; remove it from the text or switch the turn off with 'train': false"
            )


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    for field in ("reasoning_content", "content"):
        if field in message:
            yield field, message[field]
    for number, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        yield f"tool call {number}", function["name"]
        yield f"tool call {number}", json.dumps(function["arguments"], ensure_ascii=False)


def end_of_turn(completion: str, message: Message, special: re.Pattern[str] | None) -> int:
    """Return where the token ends that ends the turn, having found all fields of the message.

    Reasoning, content, and name and arguments of each tool call must follow each other in this
    order. White space around a field doesn't count: templates strip it. Arguments may stand as JSON
    or key by key.

    Raises:
        TurnError: if a field isn't there, or no special token ends the turn.
    """
    ends = list(special.finditer(completion)) if special else []
    if not ends or completion[ends[-1].end() :].strip():
        raise TurnError(
            f"no special token ends its text {_short(completion)}, so a model trained on it would "
            "never learn to stop; use a template and a tokenizer that have an end-of-turn token"
        )
    body_end = _skip_back(completion, ends)
    fields_end = _find(completion, message.get("reasoning_content", "").strip(), 0, "its reasoning")
    content, calls = message["content"].strip(), message.get("tool_calls", ())
    if content and not calls:
        # An answer is the last thing of its turn: a short one can't hide in markup before it.
        fields_end = _find(
            completion[:body_end], content, max(fields_end, body_end - len(content)), "its content"
        )
    else:
        fields_end = _find(completion, content, fields_end, "its content")
    for number, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        fields_end = _find(completion, name, fields_end, f"the name of its tool call {number}")
        fields_end = _find_arguments(completion, arguments, fields_end, number)
    return ends[-1].end()


def _skip_back(text: str, specials: list[re.Match[str]]) -> int:
    """Return where the text ends without the special tokens and the white space at its end."""
    end = len(text.rstrip())
    for match in reversed(specials):
        if match.end() != end:
            break
        end = len(text[: match.start()].rstrip())
    return end


def _find(completion: str, text: str, begin: int, what: str) -> int:
    found = completion.find(text, begin)
    if found < 0:
        raise TurnError(
            f"{what} ({_short(text)}) isn't in the text that the model would learn to generate "
            f"({_short(completion)})"
        )
    return found + len(text)


def _find_arguments(completion: str, arguments: Mapping[str, Any], begin: int, number: int) -> int:
    for form in _json_forms(arguments):
        found = completion.find(form, begin)
        if found >= 0:
            return found + len(form)
    for key, value in arguments.items():
        what = f"argument {key!r} of its tool call {number}"
        begin = _find(completion, key, begin, what)
        text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        begin = _find(completion, text, begin, what)
    return begin


def _json_forms(value: Any) -> Iterator[str]:
    for ensure_ascii in (False, True):
        for separators in (None, (",", ":")):
            for sort_keys in (False, True):
                yield json.dumps(
                    value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
                )


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:40]!r}..{text[-30:]!r}"
