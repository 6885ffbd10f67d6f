"""The reverse of rendering: what the model would generate, parsed, must give the message back.

The parser is transformers' ``tokenizer.parse_response``, as servers and TRL's trainers use it. It
shares no code with rendering, so it finds what both the template and our checks get wrong.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)

from onepass_trl.chat import ChatFormatError, RenderedTurn
from onepass_trl.chat.marks import split_inline
from onepass_trl.chat.messages import REASONING_KEYS
from onepass_trl.chat.processing import ProcessingClass, chat_templates, tokenizer_of

# The parser reads this many characters of the context, to see what the prompt has of the message.
PROMPT_LENGTH = 200

KnownTemplates: TypeAlias = Callable[[str], ResponseTemplate | None]
"""Returns how answers to a chat template, by its Jinja source, are parsed; None if not known."""


def response_template_of(
    processing_class: ProcessingClass, template: str, known: KnownTemplates | None
) -> ResponseTemplate | None:
    """Return how answers to a chat template are parsed: the tokenizer's way, or a known one.

    Args:
        processing_class: The tokenizer or processor. The ``response_template`` of a tokenizer, if
            it has one, is meant for the own chat template.
        template: The Jinja source of the chat template.
        known: Asked where the tokenizer doesn't say it; None: nothing is known.

    Returns:
        A response template of transformers, None if there is none.

    Raises:
        ChatFormatError: if the tokenizer's isn't valid.
    """
    own = getattr(tokenizer_of(processing_class), "response_template", None)
    if own is None or template != chat_templates(processing_class):
        return None if known is None else known(template)
    try:
        return load_response_template(own)
    except (TypeError, ValueError) as error:
        raise ChatFormatError(
            f"tokenizer.response_template can't be used to verify rendering: {error}. Correct it, "
            "remove it, or set verify_rendering=False"
        ) from error


def check_round_trip(
    turn: RenderedTurn, processing_class: ProcessingClass, known: KnownTemplates | None = None
) -> bool:
    """Check that parsing the turn's completion gives its message back.

    White space around texts doesn't count, nor do the types of arguments: some templates write the
    number 5 and the text "5" alike.

    Returns:
        Whether it could be parsed: there is a response template, and it knows the turn's prompt.

    Raises:
        ChatFormatError: if another message comes back, or none; it shows where they differ.
    """
    tokenizer = tokenizer_of(processing_class)
    response_template = response_template_of(processing_class, turn.template, known)
    prompt = turn.context[-PROMPT_LENGTH:]
    if response_template is None or not response_template.start_anchor_re.search(prompt):
        return False
    parse = functools.partial(
        tokenizer.parse_response,
        schema=response_template,
        prefix=prompt,
        tools=None if turn.tools is None else list(turn.tools),
    )
    ids = turn.rendered.token_ids[turn.rendered.trained]
    completion, end = (
        tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in np.split(ids, [-1])
    )
    problems = []
    for generated in (completion + end, completion):  # servers may cut the token that ends a turn
        problem = _problem(turn.message, parse, generated)
        if problem is None:
            return True
        problems.append(problem)
    if _problem({"content": ""}, parse, "") is not None:
        return False  # a prompt without the usual header: the message before it is read as well
    raise ChatFormatError(
        f"{turn.name}: parsing what the model would learn to generate {problems[0]}. A server that "
        "parses so would misread it too: change the message or the chat template, or set "
        "verify_rendering=False to train it all the same"
    )


def _problem(
    message: Mapping[str, Any], parse: Callable[[str], dict[str, Any]], generated: str
) -> str | None:
    """Return in which field the generated text, parsed, differs from the message, None if equal."""
    try:
        parsed = parse(generated)
    except (KeyError, ValueError) as error:
        return f"fails: {error}. It is {generated!r}"
    for what, given, read in _fields(message, parsed):
        if not _same(given, read):
            return f"gives back another {what}: {_difference(given, read)}"
    return None


def _fields(
    message: Mapping[str, Any], parsed: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what each field is called, as it was given and as it was parsed."""
    reasoning = next(filter(None, map(parsed.get, REASONING_KEYS)), "")
    given_reasoning, content = message.get("reasoning_content", ""), message["content"]
    read_content = parsed.get("content") or ""
    if not given_reasoning and not _same(content, read_content):
        # Where a template takes inline reasoning for content, the parser may still split it off.
        given_reasoning, content = _split(content)
    yield "reasoning", given_reasoning, reasoning
    yield "content", content, read_content
    given, read = _calls(message), _calls(parsed)
    if len(given) != len(read):
        yield "number of tool calls", given, read
    for number, pair in enumerate(zip(given, read, strict=False)):
        yield f"tool call {number}", *pair


def _split(content: str) -> tuple[str, str]:
    try:
        return split_inline(content) or ("", content)
    except ValueError:  # it can't be told where the reasoning ends
        return "", content


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [
        {"name": function["name"], "arguments": function.get("arguments") or {}}
        for function in functions
    ]


def _same(given: Any, read: Any) -> bool:
    if isinstance(given, str) and isinstance(read, str):
        return _plain(given) == _plain(read)
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        theirs = {_plain(key): value for key, value in read.items()}
        return len(given) == len(theirs) and all(
            _plain(key) in theirs and _same(value, theirs[_plain(key)])
            for key, value in given.items()
        )
    if isinstance(given, list) and isinstance(read, list):
        return len(given) == len(read) and all(map(_same, given, read))
    if isinstance(read, str):
        return _plain(read) in map(_plain, _written(given))
    if isinstance(given, str):
        return _plain(given) in map(_plain, _written(read))
    return bool(given == read)


def _plain(text: str) -> str:
    """Return the text without white space around it, in the form that tokenizers may normalize."""
    return unicodedata.normalize("NFKC", text).strip()


def _written(value: Any) -> tuple[str, ...]:
    """Return how templates write a value that isn't text, as JSON or by Jinja's string filter."""
    return json.dumps(value), json.dumps(value, ensure_ascii=False), str(value)


def _difference(given: Any, read: Any) -> str:
    """Return both as text from shortly before their first differing characters."""
    texts = [
        _plain(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))
        for item in (given, read)
    ]
    shorter = min(map(len, texts))
    at = next((i for i in range(shorter) if texts[0][i] != texts[1][i]), shorter)
    ours, theirs = (text[max(0, at - 20) : at + 40] for text in texts)
    return f"from character {at} on it has {theirs!r}, the message has {ours!r}"
