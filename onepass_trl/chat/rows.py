"""Dataset rows to conversations: the forms in which chats are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.messages import Message
from onepass_trl.chat.rendering import (
    OnError,
    RenderedTurn,
    TrainOn,
    chosen_turns,
    render_turns,
)
from onepass_trl.passes import IGNORE_INDEX, Pass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NullArguments = Literal["error", "keep", "drop"]

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_LIST_COLUMNS = ("messages", "prompt", "completion", "conversations", "passes", "images")
_FORMS = (
    "'messages'; 'prompt' and 'completion' as lists of messages; 'conversations' (ShareGPT); "
    "'passes' as a list of {'input_ids', 'labels'}"
)


@dataclass(frozen=True)
class Conversation:
    """The arguments of :func:`onepass_trl.chat.render_passes` that a dataset row holds.

    Attributes:
        messages: The messages, in the OpenAI form.
        tools: The tools, or None.
        chat_template_kwargs: Further arguments of the chat template.
        train_on: The turns of the row's ``completion``, or ``"all"``.
    """

    messages: list[Message]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]
    train_on: TrainOn


def row_to_conversation(
    row: Mapping[str, Any], *, null_arguments: NullArguments = "error"
) -> Conversation:
    """Return the conversation that a dataset row holds.

    The forms, the first that the row has being taken: ``messages``; ``prompt`` and ``completion``
    as lists of messages, of which only the completion's turns are trained; ``conversations``
    (ShareGPT: ``from`` and ``value``, or ``role`` and ``content``); each also as the JSON text of
    such a list. Beside it the row may have ``system``, the text of a system message that comes
    first, and ``tools`` and ``chat_template_kwargs``, each also as JSON text; unless they are text,
    their null entries are dropped, as datasets fill missing keys with nulls.

    Args:
        row: A row of a dataset.
        null_arguments: What to do with a null among the arguments of a tool call. In an Arrow
            struct column (what ``Dataset.from_list`` makes) every call gets the argument names of
            all calls, filled with nulls, and real nulls can't be told from those: ``"drop"`` them
            there. In a column of type ``Json`` (what loading JSON lines makes) they are real:
            ``"keep"`` them. ``"error"`` refuses them. Those of a column that is JSON text are kept.

    Raises:
        ChatFormatError: if the row has none of these forms, images, or something that can't be
            read.

    >>> row_to_conversation({"conversations": [{"from": "human", "value": "Hi"}]}).messages
    [{'role': 'user', 'content': 'Hi'}]
    """
    if null_arguments not in ("error", "keep", "drop"):
        raise ChatFormatError(
            f"null_arguments must be 'error', 'keep' or 'drop', got {null_arguments!r}"
        )
    row, from_text = _from_json_text(row)
    _refuse_other_data(row)
    columns: tuple[str, ...]
    if row.get("messages") is not None:
        columns = ("messages",)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        columns = ("prompt", "completion")
    elif row.get("conversations") is not None:
        columns = ("conversations",)
    else:
        found = [f"{name!r}{' (null)' if value is None else ''}" for name, value in row.items()]
        raise ChatFormatError(
            f"the row has none of the accepted forms: {_FORMS}. Its columns are "
            f"{', '.join(found) or 'none'}; rename or convert them"
        )
    messages: list[Message] = []
    for column in columns:
        nulls = "keep" if column in from_text else null_arguments
        for message in _message_list(row, column):
            messages.append(_settle_nulls(message, len(messages), nulls))
    train_on: TrainOn = "all"
    if "completion" in columns:
        turns = [message.get("role") == "assistant" for message in messages]
        train_on = list(range(sum(turns[: len(row["prompt"])]), sum(turns)))
        if not train_on:
            raise ChatFormatError("'completion' has no assistant message, so nothing is trained")
    return Conversation(
        messages=_with_system(row, messages),
        tools=_decoded(row, "tools", list),
        chat_template_kwargs=_decoded(row, "chat_template_kwargs", dict) or {},
        train_on=train_on,
    )


def row_to_passes(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: TrainOn = "all",
    null_arguments: NullArguments = "error",
) -> list[Pass]:
    """Return the passes of a dataset row, of any form that is accepted.

    Args:
        row: A row as :func:`row_to_conversation` takes it, or one with ``passes``, which come
            before messages: a list of ``{"input_ids", "labels"}``, where a label is -100 or the id
            at its own index.
        tokenizer: A tokenizer with a chat template.
        tools: The tools of rows that have none of their own.
        chat_template_kwargs: Further arguments of the chat template; the row's own come first.
        train_on: As for :func:`onepass_trl.chat.render_passes`. For a row with a ``completion`` it
            must be ``"all"`` or ``"last"``, and is meant of the completion's turns.
        null_arguments: As for :func:`row_to_conversation`.

    Raises:
        ChatFormatError: if the row can't be read or rendered.
    """
    if row.get("passes") is not None:
        return list(numbered_passes(row["passes"], train_on).values())
    turns = row_to_turns(
        row,
        tokenizer,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        train_on=train_on,
        null_arguments=null_arguments,
    )
    return [turn.rendered for turn in turns]


def numbered_passes(passes: Any, train_on: TrainOn = "all") -> dict[int, Pass]:
    """Return the passes of a row's ``passes`` that `train_on` chooses and that train something.

    The keys are their numbers in the row; the other arguments and errors are those of
    :func:`row_to_passes`.
    """
    decoded, _ = _from_json_text({"passes": passes})
    given = _given_passes(decoded["passes"])
    chosen = chosen_turns(train_on, len(given))
    trained = {n: pass_ for n, pass_ in enumerate(given) if n in chosen and pass_.num_trained}
    if not trained:
        raise ChatFormatError(
            f"no label of the passes that train_on={train_on!r} chooses is trained: all are "
            f"{IGNORE_INDEX}; choose others, or remove the row"
        )
    return trained


def row_to_turns(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: TrainOn = "all",
    null_arguments: NullArguments = "error",
    on_error: OnError | None = None,
) -> list[RenderedTurn]:
    """Return the rendered turns of a row that holds a conversation, not ``passes``.

    Arguments and errors are those of :func:`row_to_passes`, and `on_error` that of
    :func:`onepass_trl.chat.render_turns`.
    """
    conversation = row_to_conversation(row, null_arguments=null_arguments)
    if conversation.train_on != "all":
        if train_on not in ("all", "last"):
            raise ChatFormatError(
                f"train_on={train_on!r} lists turns, but the row's 'completion' already says which "
                "are trained; use 'all' or 'last', or give the row as 'messages'"
            )
        train_on = conversation.train_on if train_on == "all" else "last"
    return render_turns(
        conversation.messages,
        tokenizer,
        tools=tools if conversation.tools is None else conversation.tools,
        chat_template_kwargs={**(chat_template_kwargs or {}), **conversation.chat_template_kwargs},
        train_on=train_on,
        on_error=on_error,
    )


def _from_json_text(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], set[str]]:
    """Return the row with the columns that hold a JSON list of objects decoded, and their names.

    JSON text is the one way to store messages of any shape in an Arrow table unchanged: its nulls
    are real.
    """
    decoded = {}
    for column in _LIST_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                items = json.loads(value)
            except ValueError:
                continue  # plain text that begins with a bracket
            if all(isinstance(item, Mapping) for item in items):
                decoded[column] = items
    return {**row, **decoded}, set(decoded)


def _refuse_other_data(row: Mapping[str, Any]) -> None:
    """Raise an error for rows with images and for plain text, which need no passes."""
    for column in ("image", "images"):
        if row.get(column) is not None and row[column] != []:
            raise ChatFormatError(
                f"the row has vision data in column {column!r}, which isn't supported, only text; "
                "train it with TRL's SFTTrainer or remove the column"
            )
    if any(row.get(column) is not None for column in ("messages", "conversations")):
        return
    for column in ("text", "prompt", "completion"):
        if isinstance(row.get(column), str):
            raise ChatFormatError(
                f"the row has plain text in column {column!r}: it is one sequence, which TRL's "
                "SFTTrainer trains the same; use that, or give the row in one of the accepted "
                f"forms: {_FORMS}"
            )


def _message_list(row: Mapping[str, Any], column: str) -> list[Message]:
    value = row[column]
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, Mapping) for m in value):
        raise ChatFormatError(
            f"column {column!r} must be a list of message dicts, got {type(value).__name__}: "
            f"{str(value)[:80]!r}"
        )
    if column == "conversations":
        return [_from_sharegpt_message(dict(m), index) for index, m in enumerate(value)]
    return [dict(message) for message in value]


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages after the row's system prompt, if it has one."""
    if not row.get("system"):
        return messages
    if messages and messages[0].get("role") == "system":
        raise ChatFormatError(
            "the row has a 'system' column and a system message among its messages; keep one"
        )
    return [{"role": "system", "content": row["system"]}, *messages]


def _from_sharegpt_message(message: Message, index: int) -> Message:
    """Return the message with ``role`` and ``content`` for ``from`` and ``value``."""
    out = {key: value for key, value in message.items() if value is not None}
    sender = out.pop("from", None)
    if sender is None:
        return out
    if "role" in out or "value" not in out or "content" in out:
        raise ChatFormatError(
            f"message {index} of 'conversations' must have 'from' and 'value', or 'role' and "
            f"'content', got {', '.join(map(repr, message))}"
        )
    out = {"role": _SHAREGPT_ROLES.get(sender, sender), "content": out.pop("value"), **out}
    if sender == "function_call":
        out["content"], out["tool_calls"] = _function_calls(out["content"], index)
    return out


def _function_calls(value: Any, index: int) -> tuple[str, list[Any]]:
    """Return the inline reasoning before the calls, if any, and the calls."""
    thought = ""
    if isinstance(value, str):
        before, closed, after = value.rpartition("</think>")
        if closed and before.lstrip().startswith("<think>"):
            thought, value = before + closed, after
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ChatFormatError(
                f"message {index} of 'conversations' is from function_call, but its value isn't "
                f"JSON: {error}; got {value[:80]!r}, expected {{'name': .., 'arguments': {{..}}}}"
            ) from error
        value = [_with_json_arguments(call) for call in _as_list(value)]
    return thought, _as_list(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _with_json_arguments(call: Any) -> Any:
    """Return a call that was JSON text with its arguments as JSON text: their nulls are real."""
    if isinstance(call, Mapping) and isinstance(call.get("arguments"), Mapping):
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return call


def _decoded(row: Mapping[str, Any], column: str, kind: type) -> Any:
    """Return a column given as itself, without null entries, or as JSON text, with them."""
    value = row.get(column)
    is_text = isinstance(value, str)
    if is_text:
        try:
            value = json.loads(value) if value else None
        except ValueError as error:
            raise ChatFormatError(
                f"column {column!r} isn't valid JSON: {error}; got {str(value)[:80]!r}"
            ) from error
    if value is None:
        return None
    if not isinstance(value, kind):
        raise ChatFormatError(
            f"column {column!r} must be a {kind.__name__} or JSON text of one, got "
            f"{type(value).__name__}"
        )
    return value if is_text else without_nulls(value)


def without_nulls(value: Any) -> Any:
    """Return the value without null entries of dicts at any depth; lists keep theirs.

    >>> without_nulls({"a": None, "b": [{"c": None}, None]})
    {'b': [{}, None]}
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def _settle_nulls(message: Message, index: int, null_arguments: NullArguments) -> Message:
    calls = message.get("tool_calls")
    if null_arguments == "keep" or not isinstance(calls, (list, tuple)):
        return message
    clean = [without_nulls(call) for call in calls]
    if null_arguments == "error":
        for number, (call, cleaned) in enumerate(zip(calls, clean, strict=True)):
            if _call_arguments(call) not in (None, _call_arguments(cleaned)):
                raise ChatFormatError(
                    f"message {index}: tool call {number} has a null among its arguments, which "
                    "may be a value or may have been filled in by an Arrow struct column; store "
                    "the arguments as JSON text, or say which it is with null_arguments='keep' or "
                    "null_arguments='drop'"
                )
    return {**message, "tool_calls": clean}


def _call_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return None
    function = call.get("function")
    return (function if isinstance(function, Mapping) else call).get("arguments")


def _given_passes(passes: Any) -> list[Pass]:
    if not isinstance(passes, (list, tuple)) or not passes:
        raise ChatFormatError(
            f"'passes' must be a non-empty list of {{'input_ids', 'labels'}}, got "
            f"{str(passes)[:80]!r}"
        )
    return [_given_pass(given, number) for number, given in enumerate(passes)]


def _given_pass(given: Any, number: int) -> Pass:
    keys = ("input_ids", "labels")
    if not isinstance(given, Mapping) or any(given.get(key) is None for key in keys):
        raise ChatFormatError(
            f"pass {number} must be a dict with 'input_ids' and 'labels', got {str(given)[:80]}"
        )
    ids, labels = (np.asarray(given[key]) for key in keys)
    if (
        ids.ndim != 1
        or ids.shape != labels.shape
        or not all(a.dtype.kind in "iu" for a in (ids, labels))
    ):
        raise ChatFormatError(
            f"pass {number} needs lists of whole numbers of one length, got input_ids {ids.dtype} "
            f"{ids.shape} and labels {labels.dtype} {labels.shape}"
        )
    trained = labels != IGNORE_INDEX
    wrong = np.flatnonzero(trained & (labels != ids))
    if wrong.size:
        at = int(wrong[0])
        raise ChatFormatError(
            f"pass {number} has label {labels[at]} at index {at}, expected {IGNORE_INDEX} or the "
            f"id there, {ids[at]}: labels stand at their own token, not shifted"
        )
    try:
        return Pass(ids, trained)
    except ValueError as error:
        raise ChatFormatError(f"pass {number}: {error}") from error
