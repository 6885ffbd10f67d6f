"""Checks on a turn's completion: all that the message holds is in it, and it ends as it should."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from onepass_trl.chat.errors import TurnError
from onepass_trl.chat.marks import THINK_CLOSE, THINK_OPEN, closes_reasoning
from onepass_trl.chat.messages import REASONING_KEYS, Message, as_text
from onepass_trl.wording import counted

_INLINE = re.compile(rf"\s*{THINK_OPEN}\s*")


def check_generable(
    message: Message,
    special: re.Pattern[str] | None,
    *,
    reads_reasoning: bool,
    has_marks: bool,
) -> None:
    """Check that generation could produce this message: nothing in it ends the turn early.

    Args:
        message: The turn's message in its normal form.
        special: Finds special tokens.
        reads_reasoning: Whether turns of this template have reasoning apart from their content.
        has_marks: Whether the template writes ``</think>`` or compares texts with it.

    Raises:
        TurnError: if the message's own text holds a special token, or a ``</think>`` at which the
            model's output would be cut, or with which reasoning in the content ends.
    """
    for field, text in _texts(message):
        found = special.search(text) if special else None
        if found:
            raise TurnError(
                f"its {field} contains the special token {found.group()!r}, at which generation "
                "would end or be misread; remove it from the text or switch the turn off with "
                "'train': false"
            )
    field = "reasoning_content" if "reasoning_content" in message else "content"
    if THINK_CLOSE not in message[field] or not reads_reasoning:
        return
    if field == "content" and closes_reasoning(message["content"]):
        quote = "remove it from the text" if has_marks else "put it in quotation marks"
        raise TurnError(
            f"its content contains {THINK_CLOSE!r}; if what comes before it is reasoning, give it "
            f"as 'reasoning_content', else {quote} or switch the turn off with 'train': false"
        )
    if has_marks:
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


def without_prompt(context: str, message: Message) -> Message:
    """Return the message without the ``<think>`` of its content that the prompt already holds."""
    inline = _INLINE.match(message["content"])
    if inline is None or not context.rstrip().endswith(THINK_OPEN):
        return message
    return {**message, "content": message["content"][inline.end() :]}


def mentions_marks(message: Message) -> bool:
    """Return whether a text of the message has ``<think>`` or ``</think>``."""
    return any(mark in text for _, text in _texts(message) for mark in (THINK_OPEN, THINK_CLOSE))


def end_of_turn(
    completion: str, message: Message, special: re.Pattern[str] | None, closing_tag: str
) -> int:
    """Return where the token ends that ends the turn, having found all fields of the message.

    The reasoning must come before everything else, the content before or after the tool calls,
    those in their order. White space around a field doesn't count: templates strip it. Arguments
    may be written as JSON or key by key.

    Args:
        completion: What the model must generate.
        message: The turn's message in its normal form.
        special: Finds special tokens.
        closing_tag: What the template writes next after a content, see
            `onepass_trl.chat.closing.ClosingMarks`.

    Raises:
        TurnError: if a field isn't there, or no special token ends the turn.
    """
    ends = list(special.finditer(completion)) if special else []
    if not ends or completion[ends[-1].end() :].strip():
        raise TurnError(
            f"no special token ends its text {_short(completion)}, so a model trained on it would "
            "never learn to stop; use a template and a tokenizer that have an end-of-turn token"
        )
    body = completion[: _skip_back(completion, ends)]
    begin = _find(body, message.get("reasoning_content", "").strip(), 0, "its reasoning")
    content, calls = message["content"].strip(), message.get("tool_calls", ())
    if not calls:
        # An answer is the last thing of its turn, but for the tag that closes it.
        body = body.removesuffix(closing_tag).rstrip()
        _find(body, content, max(begin, len(body) - len(content)), "its content")
        return ends[-1].end()
    try:
        _find_calls(body, calls, _find(body, content, begin, "its content"))
    except TurnError:
        _find(body, content, _find_calls(body, calls, begin), "its content")
    return ends[-1].end()


def check_marks(context: str, completion: str) -> None:
    """Check that the reasoning, if any, is opened once and closed once.

    Args:
        context: What inference feeds before the turn; the prompt at its end may hold the marks.
        completion: What the model must generate. No text of the message in it has a mark.

    Raises:
        TurnError: if a mark is missing, or written again.
    """
    prompt = context.rstrip()
    closed = prompt.endswith(THINK_CLOSE)
    num_opened = completion.count(THINK_OPEN) + (closed or prompt.endswith(THINK_OPEN))
    num_closed = completion.count(THINK_CLOSE) + closed
    if num_opened != num_closed or num_opened > 1:
        raise TurnError(
            f"its reasoning would be opened {counted(num_opened, 'time')} with {THINK_OPEN!r} and "
            f"closed {counted(num_closed, 'time')} with {THINK_CLOSE!r}: the prompt ends in "
            f"{context[-20:]!r}, and "
            f"the model would learn to generate {_short(completion)}. Use a template that opens "
            "reasoning once, or add its family with onepass_trl.register_family"
        )


def with_stand_ins(message: Message) -> tuple[Message, dict[str, str]]:
    """Return the message with other texts in its fields, and these texts by what they replace.

    No template holds them. So where they appear, the template writes the field: a short text, such
    as the answer ``>``, may be found elsewhere, and a dropped call's name in the reasoning.
    """
    out, texts = dict(message), {}
    if message.get("reasoning_content", "").strip():
        texts["its reasoning"] = "stand-in for reasoning"
        out.update(dict.fromkeys(REASONING_KEYS, texts["its reasoning"]))
    if message["content"].strip():
        out["content"] = texts["its content"] = "stand-in for content"
        if inline := _INLINE.match(message["content"]):  # the template takes it for content
            out["content"] = f"{inline.group()}stand-in{THINK_CLOSE}{out['content']}"
    if "tool_calls" in message:
        out["tool_calls"] = []
    for number, call in enumerate(message.get("tool_calls", ())):
        name, key, value = (f"stand_in_{kind}_{number}" for kind in ("name", "key", "value"))
        if isinstance(call.get("id"), str):  # Kimi K2 has the name in the id, and nowhere else
            call = {**call, "id": call["id"].replace(f".{call['function']['name']}:", f".{name}:")}
        texts[f"the name of its tool call {number}"] = name
        texts[f"an argument of its tool call {number}"] = key
        texts[f"the value of an argument of its tool call {number}"] = value
        out["tool_calls"].append({**call, "function": {"name": name, "arguments": {key: value}}})
    return out, texts


def after_stand_ins(text: str, texts: Mapping[str, str]) -> str | None:
    """Return what a text has after the last of the texts of a message, None if it has none."""
    ends = [text.rfind(part) + len(part) for part in texts.values() if part in text]
    return text[max(ends) :] if ends else None


def check_stand_ins(
    completion: str, message: Message, texts: Mapping[str, str], *, reads_reasoning: bool
) -> None:
    """Check that the texts of :func:`with_stand_ins` are in the completion of its message.

    Raises:
        TurnError: if one doesn't.
    """
    for what, text in texts.items():
        if text not in completion:
            ids = [call["id"] for call in message.get("tool_calls", ()) if call.get("id")]
            if what.startswith("the name") and any(call_id in completion for call_id in ids):
                raise TurnError(
                    f"{what} isn't written by the template, which writes the id {ids[0]!r} in its "
                    "place: give calls the ids that the model generates, such as 'functions.NAME:0'"
                )
            move = ""
            if what == "its content" and "tool_calls" in message:
                place = "put it into its 'reasoning_content'" if reads_reasoning else "remove it"
                move = f"the template writes no text with a tool call: {place}, "
            raise TurnError(
                f"{what} isn't written by the template, which writes such a turn as "
                f"{_short(completion)}; {move}{_REMEDY}"
            )


def _skip_back(text: str, specials: list[re.Match[str]]) -> int:
    """Return where the text ends without the special tokens and the white space at its end."""
    end = len(text.rstrip())
    for match in reversed(specials):
        if match.end() != end:
            break
        end = len(text[: match.start()].rstrip())
    return end


def _find(text: str, part: str, begin: int, what: str) -> int:
    found = text.find(part, begin)
    if found < 0:
        raise _missing(what, part, text)
    return found + len(part)


def _missing(what: str, part: str, text: str) -> TurnError:
    return TurnError(
        f"{what} ({_short(part)}) isn't in the text that the model would learn to generate "
        f"({_short(text)}): the template drops or changes it; {_REMEDY}"
    )


_REMEDY = "use a template that writes it, or switch the turn off with 'train': false"


def _find_calls(text: str, calls: Sequence[Mapping[str, Any]], begin: int) -> int:
    for number, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        begin = _find(text, name, begin, f"the name of its tool call {number}")
        begin = _find_arguments(text, arguments, begin, number)
    return begin


def _find_arguments(text: str, arguments: Mapping[str, Any], begin: int, number: int) -> int:
    """Return where the arguments end: as JSON, or each key and value, in any order."""
    if not arguments:
        return begin
    as_json = _ends(text, [*_json_forms(arguments), as_text(arguments)], begin)
    try:
        ends = [begin]
        for key, value in arguments.items():
            what = f"argument {key!r} of its tool call {number}"
            ends.append(_find(text, key, begin, what))
            ends.append(_find_value(text, value, begin, what))
    except TurnError:
        if not as_json:
            raise
        return min(as_json)
    # What another call holds as JSON may be here key by key: the nearer is meant.
    return min([*as_json, max(ends)])


def _ends(text: str, forms: Iterable[str], begin: int) -> list[int]:
    """Return where those of the forms end that are in the text."""
    return [found + len(form) for form in forms if (found := text.find(form, begin)) >= 0]


def _find_value(text: str, value: Any, begin: int, what: str) -> int:
    forms = list(written_forms(value))
    ends = _ends(text, forms, begin)
    if ends:
        return min(ends)
    if not isinstance(value, (Mapping, list, tuple)):
        raise _missing(what, forms[0], text)
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    return max((_find_value(text, item, begin, what) for item in items), default=begin)


def written_forms(value: Any) -> Iterator[str]:
    """Yield the ways in which templates write a value: Jinja's ``string`` filter is Python's."""
    if not isinstance(value, str):
        yield from _json_forms(value)
        yield str(value)
        return
    yield value.strip()
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    yield escaped.replace("\n", "\\n").replace("\r", "\\r")  # LFM2.5's single-quoted strings
    for ensure_ascii in (False, True):
        yield json.dumps(value, ensure_ascii=ensure_ascii)[1:-1]


def _json_forms(value: Any) -> Iterator[str]:
    for ensure_ascii in (False, True):
        for separators in (None, (",", ":")):
            for sort_keys in (False, True):
                yield json.dumps(
                    value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
                )


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:40]!r}..{text[-30:]!r}"
