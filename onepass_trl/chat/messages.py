"""Messages in one form: the only place that knows the spellings of reasoning and tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.images import ImageContent, is_image_part, source_of
from onepass_trl.chat.json_text import unique
from onepass_trl.chat.marks import (
    REASONING_WORDS,
    THINK_CLOSE,
    THINK_OPEN,
    other_mark,
    split_inline,
    thought_within,
    words_of,
)
from onepass_trl.passes import ImageSource

Message = dict[str, Any]


class TextArguments(dict[str, Any]):
    """The arguments of a tool call that was given as JSON text.

    Attributes:
        text: The text, for templates that take one: it may have other white space, escapes and
            forms of numbers than arguments that are serialized again.
    """

    def __init__(self, arguments: Mapping[str, Any], text: str) -> None:
        super().__init__(arguments)
        self.text = text


MAX_DEPTH = 100
"""To how many levels arguments may be nested: Python's JSON, Jinja and the checks recurse."""
_TOO_DEEP = f"are nested more than {MAX_DEPTH} levels deep; make them flatter"

_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL_FORM = "{'function': {'name': .., 'arguments': {..}}}"
# What to do with parts of other types, by a word of the type; the first that it has counts.
_PART_REMEDIES = {
    "redacted": "nobody can read it, so remove the turn",
    **dict.fromkeys(sorted(REASONING_WORDS), "give its text as 'reasoning_content'"),
    **dict.fromkeys(
        ("result", "output", "response"),
        "make it a message of its own, {'role': 'tool', 'content': ..}, after the call's",
    ),
    **dict.fromkeys(
        ("tool", "function", "call"), f"give it in the message's 'tool_calls', as {_CALL_FORM}"
    ),
    "image": "give it as {'type': 'image', 'image': ..} or with 'path', 'url', 'base64' or 'bytes'",
    **dict.fromkeys(
        ("video", "audio"),
        "only text and images can be read: train such rows with TRL's SFTTrainer or remove the "
        "part",
    ),
}
_OTHER_PART = "give its text as a part of type 'text', or remove it"

_CALLS = {"call", "calls"}
_CALL_ROLES = {"tool", "function", *_CALLS}  # of messages that hold the assistant's calls as JSON
ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    **{role: role for role in ROLES},  # such as "User"
    "human": "user",
    **dict.fromkeys(("ai", "bot", "chatgpt", "gpt", "model"), "assistant"),
    **dict.fromkeys(("environment", "function", "ipython", "observation"), "tool"),
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Under which other names formats keep what a message says.
_CONTENT_KEYS = (
    *("answer", "body", "contents", "message", "msg", "output", "parts", "response", "result"),
    *("text", "utterance", "value"),
)
_FLAGS = ("weight", "loss", "loss_mask", "trainable")  # of OpenAI's files and others, for ``train``


def normalize_messages(
    messages: Iterable[Any],
    *,
    inline_reasoning: bool,
    part_separator: Callable[[], str] = lambda: "\n",
) -> list[Message]:
    """Return copies of the messages in the one form that the rest of this package works with.

    Every message has a known ``role`` and a string ``content``, which is an `ImageContent` if there
    are images in it. An assistant message may have ``reasoning_content`` (a non-empty string,
    repeated as ``reasoning`` and ``thinking``, the names that some templates read) and
    ``tool_calls`` (a non-empty list of ``{"type": "function", "function": {"name": str,
    "arguments": dict}, ...}``). Keys whose value is None are dropped, since datasets fill missing
    keys with None; nulls inside tool arguments are kept. A ``train`` flag stays, and a ``weight``,
    ``loss`` or ``trainable`` of 0 or 1 becomes one.

    Args:
        messages: Messages in the OpenAI form.
        inline_reasoning: Whether ``<think>..</think>`` at the start of an assistant's content is
            reasoning. If not, it is left in the content.
        part_separator: Returns what comes between two text parts of a content: a line end in what
            servers give to templates that take strings.

    Raises:
        ChatFormatError: if a message isn't in a form that is understood; it names the message.

    >>> answer = {"role": "assistant", "content": "<think>2+2</think>4"}
    >>> [message] = normalize_messages([answer], inline_reasoning=True)
    >>> message["reasoning_content"], message["reasoning"], message["thinking"], message["content"]
    ('2+2', '2+2', '2+2', '4')
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ChatFormatError(
            f"messages must be a list of {{'role': .., 'content': ..}} dicts, got "
            f"{type(messages).__name__}"
        )
    return [
        _normalize(message, index, inline_reasoning, part_separator)
        for index, message in enumerate(messages)
    ]


def _normalize(
    message: Any, index: int, inline_reasoning: bool, part_separator: Callable[[], str]
) -> Message:
    if not isinstance(message, Mapping):
        _refuse(index, f"must be a dict with 'role' and 'content', got {type(message).__name__}")
    out = {key: value for key, value in message.items() if value is not None}
    out = with_calls(out, index)
    role = out.get("role")
    if role is None:
        _refuse(index, f"has no 'role', expected one of {', '.join(ROLES)}")
    if role not in ROLES:
        meant = {_OTHER_ROLES[word] for word in words_of(str(role)) & _OTHER_ROLES.keys()}
        rename = f"rename it to {meant.pop()!r}" if len(meant) == 1 else "rename it"
        _refuse(index, f"has role {role!r}, expected one of {', '.join(ROLES)}; {rename}")
    for key in _CONTENT_KEYS:
        if not out.get("content") and out.get(key):
            _refuse(index, f"has {key!r} and no 'content'; rename it")
    if role == "user" and "content" not in out:
        _refuse(index, "is a user's and has no 'content'; give it, or remove the message")
    out["content"] = _text(out.get("content", ""), index, part_separator)
    if out.get("function_call"):
        _refuse(index, "has 'function_call', the old form of 'tool_calls'; make it a list of one")
    for name in _FLAGS:
        if name in out:
            _read_flag(out, name, index)
    train = out.get("train", False)
    if not isinstance(train, bool) or (train and role != "assistant"):
        _refuse(
            index,
            f"has train={train!r} and role {role!r}; only an assistant's may be true, others false",
        )
    if role == "assistant":
        if isinstance(out["content"], ImageContent):
            _refuse(index, "is the assistant's and has an image, but models generate text only")
        _move_reasoning(out, index, inline_reasoning)
        calls = _tool_calls(out.pop("tool_calls", []), index)
        if calls:
            out["tool_calls"] = calls
    elif out.get("tool_calls"):
        _refuse(index, f"has tool_calls but role {role!r}; only assistant messages call tools")
    else:
        out.pop("tool_calls", None)
    return out


def _read_flag(message: Message, name: str, index: int) -> None:
    """Turn a flag of another name into a ``train`` flag."""
    flag = message.pop(name)
    if flag not in (0, 1) or message.get("train", bool(flag)) != bool(flag):
        _refuse(
            index,
            f"has {name}={flag!r} and train={message.get('train')!r}; a turn is trained "
            f"('train': true, or {name} 1) or not ('train': false, or {name} 0)",
        )
    if message.get("role") == "assistant":
        message["train"] = bool(flag)


def _refuse(index: int, problem: str) -> NoReturn:
    raise ChatFormatError(f"message {index} {problem}")


def _text(content: Any, index: int, part_separator: Callable[[], str]) -> str:
    """Return the content as one string, from a string or a list of parts."""
    if not isinstance(content, str):
        if not isinstance(content, (list, tuple)):
            _refuse(
                index,
                f"has content of type {type(content).__name__}, expected a string or a list of "
                "parts",
            )
        parts = [_part(part, index, number) for number, part in enumerate(content)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            content = ImageContent(parts)
        else:
            content = (part_separator() if len(parts) > 1 else "").join(texts)
    if not is_encodable(content):
        _refuse(
            index, "has content with an unpaired surrogate, which no tokenizer encodes; remove it"
        )
    return content


def _part(part: Any, index: int, number: int) -> str | ImageSource:
    if isinstance(part, str):
        return part
    if is_image_part(part):
        try:
            source = source_of(part)
        except ChatFormatError as error:
            _refuse(index, f"has an image in part {number} that can't be used: {error}")
        if source is None:
            _refuse(
                index,
                f"has a place for an image in part {number}, and no image for it: give it there, "
                "as {'type': 'image', 'image': ..}, or in the row's column 'images'",
            )
        return source
    if not isinstance(part, Mapping):
        _refuse(
            index,
            f"has a content part of type {type(part).__name__}, expected {{'type': 'text', 'text': "
            f"..}}",
        )
    kind = part.get("type")
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    if kind in _TEXT_PARTS:
        _refuse(index, f"has a content part of type {kind!r} without a 'text' string; give it one")
    words = words_of(str(kind))
    remedy = next((_PART_REMEDIES[word] for word in _PART_REMEDIES if word in words), _OTHER_PART)
    _refuse(index, f"has a content part (number {number}) of type {kind!r}; {remedy}")


def is_encodable(text: str) -> bool:
    """Return whether a tokenizer can encode a text: whether it has no unpaired surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _move_reasoning(message: Message, index: int, inline_reasoning: bool) -> None:
    """Put the message's reasoning, however it is spelled, into the keys that templates read."""
    given = {key: message.pop(key) for key in REASONING_KEYS if key in message}
    for key, value in given.items():
        if not isinstance(value, str):
            _refuse(index, f"has {key} of type {type(value).__name__}, expected a string")
        if not is_encodable(value):
            _refuse(
                index,
                f"has {key} with an unpaired surrogate, which no tokenizer encodes; remove it",
            )
    values = {value for value in given.values() if value}
    if len(values) > 1:
        _refuse(index, f"has different reasoning in {' and '.join(given)}; keep one of them")
    reasoning = values.pop() if values else ""
    if inline_reasoning:
        content = message["content"]
        try:
            inline = split_inline(content)
        except ValueError as error:
            _refuse(index, str(error))
        # Where a message has reasoning elsewhere, other marks are part of its texts.
        known = given or inline
        if not known and (mark := other_mark(content) or thought_within(content)):
            _refuse(
                index,
                f"has content with {mark!r}; if reasoning comes after it, give that as "
                "'reasoning_content' without such marks, else say so by an empty "
                "'reasoning_content'",
            )
        if inline and reasoning:
            _refuse(
                index,
                f"has reasoning twice, in {' and '.join(given)} and as {THINK_OPEN} in its "
                "content; keep one of them",
            )
        if inline:
            reasoning, message["content"] = inline
    if reasoning:
        message.update(dict.fromkeys(REASONING_KEYS, reasoning))


def with_calls(message: Message, index: int) -> Message:
    """Return a message that holds calls as JSON as one of the assistant, and others as they are.

    Raises:
        ChatFormatError: if it isn't JSON; the message is called by its index.
    """
    words = words_of(str(message.get("role")))
    if not (words & _CALLS and words <= _CALL_ROLES):
        return message
    content = message.get("content")
    thought, calls = "", content
    if isinstance(content, str):
        before, closed, after = content.rpartition(THINK_CLOSE)
        if closed and before.lstrip().startswith(THINK_OPEN):
            thought, content = before + closed, after
        try:
            calls = json.loads(content, object_pairs_hook=unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            _refuse(
                index,
                f"has role {message['role']!r}, but its content isn't JSON: {error}; got "
                f"{content[:80]!r}, expected {{'name': .., 'arguments': {{..}}}}",
            )
    calls = calls if isinstance(calls, list) else [calls]
    return {**message, "role": "assistant", "content": thought, "tool_calls": calls}


def _tool_calls(calls: Any, index: int) -> list[dict[str, Any]]:
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Iterable):
        _refuse(
            index, f"has tool_calls of type {type(calls).__name__}, expected a list of tool calls"
        )
    return [_tool_call(call, index, number) for number, call in enumerate(calls)]


def _tool_call(call: Any, index: int, number: int) -> dict[str, Any]:
    """Return the call in its nested form, with the arguments as a dict and other keys kept."""
    if not isinstance(call, Mapping):
        _refuse(
            index, f"has tool call {number} of type {type(call).__name__}, expected {_CALL_FORM}"
        )
    out = {key: value for key, value in call.items() if value is not None}
    if "function" in out:
        function = out.pop("function")
    else:
        function = {key: out.pop(key) for key in ("name", "arguments") if key in out}
    if not isinstance(function, Mapping):
        _refuse(
            index,
            f"has tool call {number} with function of type {type(function).__name__}, expected "
            f"{_CALL_FORM}",
        )
    function = {key: value for key, value in function.items() if value is not None}
    if not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(index, f"has tool call {number} without a function name, expected {_CALL_FORM}")
    if "arguments" not in function:
        for key in ("parameters", "args", "input"):
            if key in function or key in out:
                _refuse(
                    index, f"has tool call {number} with {key!r}, expected 'arguments'; rename it"
                )
    function["arguments"] = _arguments(function.get("arguments", {}), index, number)
    return {"type": "function", **out, "function": function}


def _arguments(given: Any, index: int, number: int) -> dict[str, Any]:
    problem = f"has tool call {number} with arguments that"
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given, object_pairs_hook=unique, parse_constant=_no_constant)
        except RecursionError:
            _refuse(index, f"{problem} {_TOO_DEEP}; got {given[:80]!r}")
        except ValueError as error:
            _refuse(index, f"{problem} aren't valid JSON: {error}; got {given[:80]!r}")
    if not isinstance(arguments, Mapping):
        _refuse(
            index, f"{problem} are {type(arguments).__name__}, expected a dict or a JSON object"
        )
    if _is_deeper(arguments, MAX_DEPTH):
        _refuse(index, f"{problem} {_TOO_DEEP}")
    try:
        encodable = is_encodable(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        _refuse(index, f"{problem} can't be written as JSON: {error}")
    if not encodable:
        _refuse(
            index, f"{problem} hold an unpaired surrogate, which no tokenizer encodes; remove it"
        )
    return TextArguments(arguments, given) if isinstance(given, str) else dict(arguments)


def _is_deeper(value: Any, depth: int) -> bool:
    """Return whether lists and dicts are nested in a value to more than this depth."""
    level = [value]
    for _ in range(depth):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return False
    return any(isinstance(value, (Mapping, list, tuple)) for value in level)


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def with_text_arguments(message: Message) -> Message:
    """Return the message with the arguments of its tool calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append(
            {**call, "function": {**function, "arguments": as_text(function["arguments"])}}
        )
    return {**message, "tool_calls": calls}


def as_text(arguments: Mapping[str, Any]) -> str:
    """Return arguments as JSON text, as they were given if they were given so."""
    if isinstance(arguments, TextArguments):
        return arguments.text
    return json.dumps(arguments, ensure_ascii=False)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} isn't JSON")
