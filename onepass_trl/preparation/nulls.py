"""Records as plain Python: JSON text is decoded, and what a null means is settled.

A struct column of Arrow gives each of its values the keys of all of them, filled with nulls. Only
the column's type tells these from nulls that were stored, so they are told apart here, and later
stages take every null for one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from datasets import Features, LargeList, List

from onepass_trl.chat.errors import ChatFormatError, errors_named
from onepass_trl.chat.json_text import unique
from onepass_trl.chat.records import CONVERSATIONS, Form, form_of
from onepass_trl.preparation.json_files import NOT_TEXT, UNREADABLE
from onepass_trl.preparation.options import NullArguments

_ARROW_LISTS = (List, LargeList)
_LISTS = (
    "messages",
    "prompt",
    "completion",
    "completions",
    "conversations",
    "passes",
    "images",
)
_OF_STRINGS = ("completions", "images")
_CALLS = ("tool_calls", "function", "value")  # keys of arguments, the last in ShareGPT
_PER_TOKEN = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")
_SETTINGS = ("tools", "chat_template_kwargs")


def read_record(
    record: Mapping[str, Any],
    features: Features | None = None,
    null_arguments: NullArguments = "auto",
    *,
    forms: Sequence[Form] = CONVERSATIONS,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """Return a record as plain Python, without what Arrow filled it up with.

    Messages, passes, token ids, tools and template arguments that are JSON text are decoded; the
    nulls in it are real.

    Args:
        features: of the dataset. Without them nulls may be fillers everywhere but in JSON text.
        null_arguments: what to do with a null among the arguments of a tool call: ``"keep"`` it,
            ``"drop"`` it, or ``"error"``. ``"auto"`` keeps it in columns that hold JSON, where it
            can't be a filler, and is ``"error"`` elsewhere.
        forms: the columns that may hold messages; of the first form that the record has, the
            messages are looked at.
        ignored: columns that are left out.

    Raises:
        ChatFormatError: for a null that may be either, for JSON text that isn't valid, and for a
            record that couldn't be read from its file.

    >>> read_record({"messages": '[{"role": "user", "content": null}]', "tools": [{"a": None}]})
    {'messages': [{'role': 'user', 'content': None}], 'tools': [{}]}
    """
    if null_arguments not in get_args(NullArguments):
        raise ChatFormatError(
            f"null_arguments must be one of {', '.join(get_args(NullArguments))}, got "
            f"{null_arguments!r}"
        )
    if record.get(UNREADABLE):
        raise ChatFormatError(record[UNREADABLE])
    others = json.loads(record.get(NOT_TEXT) or "[]")
    record = {
        column: _decoded(value) if column in others else value
        for column, value in record.items()
        if column not in (NOT_TEXT, *ignored)
    }
    types = features or {}
    decoded = {column: _json_list(record.get(column), column) for column in _LISTS}
    decoded = {
        column: items
        for column, items in decoded.items()
        # Other lists are plain text, but for those that may hold strings.
        if items is not None and (column in _OF_STRINGS or all(map(_is_object, items)))
    }
    read = {**record, **decoded}
    for column in _PER_TOKEN:
        if (numbers := _json_list(record.get(column), column)) is not None:
            read[column] = numbers
    for column in _SETTINGS:
        if record.get(column) is not None:
            read[column] = _setting(record[column], column, types.get(column))
    position = 0
    for column in form_of(read, forms):
        nulls = "keep" if column in decoded else null_arguments
        if nulls == "auto":
            nulls = "keep" if _is_exact(types.get(column)) else "error"
        if column == "completions":
            read[column] = _settled_completions(read[column], position, nulls)
        else:
            read[column] = _settled(read[column], position, nulls)
            position += len(read[column]) if isinstance(read[column], list) else 0
    return read


def _decoded(value: Any) -> Any:
    """Return what was stored as JSON text; what has been converted to text since, as it is."""
    try:
        decoded = json.loads(value)
    except (TypeError, ValueError):
        return value
    return value if isinstance(decoded, str) else decoded


def _json_list(value: Any, column: str) -> list[Any] | None:
    """Return the list that a column holds as JSON text, None if it holds none."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        return json.loads(value, object_pairs_hook=unique)
    except json.JSONDecodeError:
        return None  # plain text that begins with a bracket
    except ValueError as error:  # a key twice, or a number of more digits than Python reads
        raise ChatFormatError(f"column {column!r} can't be read: {error}") from None


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _setting(value: Any, column: str, feature: Any) -> Any:
    if not isinstance(value, str):
        return _without_fillers(value, feature)
    try:
        return json.loads(value, object_pairs_hook=unique) if value else None
    except ValueError as error:
        raise ChatFormatError(
            f"column {column!r} isn't valid JSON: {error}; got {value[:80]!r}"
        ) from error


def _without_fillers(value: Any, feature: Any) -> Any:
    """Return the value without null entries of structs; of all dicts where no type is known."""
    if isinstance(value, Mapping) and (feature is None or isinstance(feature, dict)):
        return {
            key: _without_fillers(item, None if feature is None else feature[key])
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, (list, tuple)) and (feature is None or isinstance(feature, _ARROW_LISTS)):
        return [
            _without_fillers(item, None if feature is None else feature.feature) for item in value
        ]
    return value


def _is_exact(feature: Any) -> bool:
    """Return whether nulls among tool-call arguments in a column of this type can't be fillers."""
    if isinstance(feature, _ARROW_LISTS):
        return _is_exact(feature.feature)
    if not isinstance(feature, dict):
        return feature is not None  # Json, or text
    if isinstance(feature.get("arguments"), (dict, *_ARROW_LISTS)):
        return False
    return all(_is_exact(feature[key]) for key in _CALLS if key in feature)


def _settled_completions(completions: Any, position: int, nulls: str) -> Any:
    if not isinstance(completions, (list, tuple)):
        return completions
    settled = []
    for number, completion in enumerate(completions):
        with errors_named(f"completion {number} of {len(completions)}"):
            settled.append(_settled(completion, position, nulls))
    return settled


def _settled(value: Any, position: int, nulls: str) -> Any:
    """Return a message, or a list of them, with the nulls of its tool calls settled.

    Args:
        value: what a column holds; anything else is returned as it is.
        position: of the first message in the conversation.
        nulls: ``"keep"``, ``"drop"`` or ``"error"``.
    """
    if isinstance(value, (list, tuple)):
        return [_settled(item, position + number, nulls) for number, item in enumerate(value)]
    if nulls == "keep" or not isinstance(value, Mapping):
        return value
    calls = {key: value[key] for key in ("tool_calls", "value") if _is_nested(value.get(key))}
    return {**value, **{key: _settled_calls(calls[key], position, nulls) for key in calls}}


def _settled_calls(given: Any, position: int, nulls: str) -> Any:
    calls = [given] if isinstance(given, Mapping) else given
    clean = [_without_fillers(call, None) for call in calls]
    if nulls == "error":
        for number, (call, cleaned) in enumerate(zip(calls, clean, strict=True)):
            if _arguments(call) not in (None, _arguments(cleaned)):
                raise ChatFormatError(
                    f"message {position}: tool call {number} has a null among its arguments, which "
                    "may be a value or may have been filled in by an Arrow struct column; store "
                    "the arguments as JSON text, or say which it is with null_arguments='keep' or "
                    "null_arguments='drop'"
                )
    return clean[0] if isinstance(given, Mapping) else clean


def _arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return None
    function = call.get("function")
    return (function if isinstance(function, Mapping) else call).get("arguments")
