"""Records of datasets to conversations: the forms in which chats are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onepass_trl.chat.columns import EMPTY, check_columns
from onepass_trl.chat.errors import ChatFormatError, errors_named
from onepass_trl.chat.images import IMAGE_COLUMNS, record_images, with_images
from onepass_trl.chat.messages import Message, with_calls
from onepass_trl.chat.template import RESERVED
from onepass_trl.chat.turns import TrainOn

Form: TypeAlias = tuple[str, ...]
"""The columns that hold messages."""

CONVERSATIONS: tuple[Form, ...] = (("messages",), ("prompt", "completion"), ("conversations",))
"""The forms of conversations; the first that a record has is taken."""
QUESTIONS: tuple[Form, ...] = (("prompt", "completions"),)
"""The form of questions with several answers."""

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_FORMS = (
    "'messages'; 'prompt' and 'completion', both as lists of messages or as text; 'conversations' "
    "(ShareGPT); 'text', or another column that dataset_text_field names; 'input_ids'; 'passes' as "
    "a list of {'input_ids', 'labels'}"
)
_WITH_MESSAGES = ("system", "tools", "chat_template_kwargs")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Conversation:
    """The arguments of :func:`onepass_trl.chat.render_passes` that a record holds.

    Attributes:
        messages: The messages, in the OpenAI form.
        tools: The tools, or None.
        chat_template_kwargs: Further arguments of the chat template.
        train_on: The turns of the record's ``completion``, or ``"all"``.
    """

    messages: list[Message]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]
    train_on: TrainOn

    def trained(self, train_on: TrainOn) -> TrainOn:
        """Return which turns are trained where `train_on` is asked for, of the completion if any.

        Raises:
            ChatFormatError: if it lists turns, and there is a completion.
        """
        if self.train_on == "all":
            return train_on
        if train_on not in ("all", "last"):
            raise ChatFormatError(
                f"train_on={train_on!r} lists turns, but the row's 'completion' already says which "
                "are trained; use 'all' or 'last', or give the row as 'messages'"
            )
        return self.train_on if train_on == "all" else "last"


@dataclass(frozen=True)
class Question:
    """What a record of a question with several answers holds.

    Attributes:
        prompt: The messages before the answer, or text.
        completions: An assistant message each; where the prompt is text, whatever is stored.
        tools: The tools, or None.
        chat_template_kwargs: Further arguments of the chat template.
    """

    prompt: list[Message] | str
    completions: list[Any]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]


def form_of(record: Mapping[str, Any], forms: Sequence[Form]) -> Form:
    """Return the first form of which the record has all columns, ``()`` if it has none."""
    return next((form for form in forms if all(record.get(c) is not None for c in form)), ())


def read_conversation(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation that a dataset's record holds.

    The forms, the first that the record has being taken: ``messages``; ``prompt`` and
    ``completion`` as lists of messages, of which only the completion's turns are trained;
    ``conversations`` (ShareGPT: ``from`` and ``value``, or ``role`` and ``content``). Next to it
    the record may have ``system``, the text of a system message that comes first, ``tools``,
    ``chat_template_kwargs``, and ``image`` or ``images``, see
    `onepass_trl.chat.images.with_images`.

    Args:
        record: A record as plain Python. Those of datasets may have to become that first: see
            `onepass_trl.preparation.nulls.read_record`.

    Raises:
        ChatFormatError: if the record has none of these forms, videos, something that can't be
            read, or a column that isn't read and may change what is trained.

    >>> read_conversation({"conversations": [{"from": "human", "value": "Hi"}]}).messages
    [{'role': 'user', 'content': 'Hi'}]
    """
    refuse_media(record, _OTHER_MEDIA)
    columns = form_of(record, CONVERSATIONS)
    if not columns:
        found = [f"{name!r}{' (null)' if value is None else ''}" for name, value in record.items()]
        raise ChatFormatError(
            f"the row has none of the accepted forms: {_FORMS}. Its columns are "
            f"{', '.join(found) or 'none'}; rename or convert them"
        )
    messages = [message for column in columns for message in _message_list(record, column)]
    train_on: TrainOn = "all"
    if "completion" in columns:
        turns = [message.get("role") == "assistant" for message in messages]
        train_on = list(range(sum(turns[: len(record["prompt"])]), sum(turns)))
        if not train_on:
            raise ChatFormatError("'completion' has no assistant message, so nothing is trained")
    check_columns(record, (*columns, *_WITH_MESSAGES, *IMAGE_COLUMNS), messages)
    messages = with_images(messages, record_images(record))
    return Conversation(_with_system(record, messages), *_settings(record), train_on)


def read_question(record: Mapping[str, Any]) -> Question:
    """Return the question that a dataset's record holds, and its completions.

    Args:
        record: A record as plain Python, as for `read_conversation`: ``prompt``, a list of messages
            or text, and ``completions``, a list of assistant messages (each as itself or as a list
            of one) or of strings. With a prompt of messages a string is the content of an assistant
            message.

    Raises:
        ChatFormatError: if the record hasn't this form, or something can't be read; it names the
            completion.
    """
    refuse_media(record)
    [columns] = QUESTIONS
    if missing := [column for column in columns if record.get(column) is None]:
        given = [repr(name) for name, value in record.items() if value is not None]
        raise ChatFormatError(
            "a row for set fine-tuning needs 'prompt' (messages or text) and 'completions' (a list "
            f"of assistant messages or strings); this one has no {' and no '.join(missing)}, only "
            f"{', '.join(given) or 'nothing'}. Rename or convert the columns"
        )
    prompt, completions = record["prompt"], record["completions"]
    if not isinstance(completions, (list, tuple)) or not completions:
        raise ChatFormatError(
            "'completions' must be a list with at least one assistant message or string, got "
            f"{str(completions)[:80]!r}: give the row a trace, or remove it"
        )
    settings = _settings(record)
    if isinstance(prompt, str):
        check_columns(record, columns, None)
        return Question(prompt, list(completions), *settings)
    messages = _message_list(record, "prompt")
    check_columns(record, (*columns, *_WITH_MESSAGES), messages)
    answers = []
    for number, completion in enumerate(completions):
        with errors_named(f"completion {number} of {len(completions)}"):
            answers.append(_as_answer(completion))
    return Question(_with_system(record, messages), answers, *settings)


def _as_answer(completion: Any) -> Message:
    if isinstance(completion, (list, tuple)) and len(completion) == 1:
        completion = completion[0]
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    if isinstance(completion, Mapping) and completion.get("role") == "assistant":
        return dict(completion)
    raise ChatFormatError(
        f"it must be one assistant message or a string, got {str(completion)[:80]!r}: earlier "
        "turns belong into 'prompt'"
    )


def refuse_media(
    record: Mapping[str, Any], columns: Sequence[str] = (*IMAGE_COLUMNS, *_OTHER_MEDIA)
) -> None:
    """Raise an error for records with images, videos or audio in one of these columns."""
    for column in columns:
        if record.get(column) in EMPTY:
            continue
        if column in IMAGE_COLUMNS:
            raise ChatFormatError(
                f"the row has column {column!r}, but images can only be trained in a conversation: "
                "give the row as 'messages', or remove the column"
            )
        raise ChatFormatError(
            f"the row has column {column!r}, but video and audio aren't supported: train the row "
            "with TRL's SFTTrainer, or remove the column"
        )


def _message_list(record: Mapping[str, Any], column: str) -> list[Message]:
    value = record[column]
    remedy = ", or give text in both 'prompt' and 'completion'" if column == "prompt" else ""
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, Mapping) for m in value):
        raise ChatFormatError(
            f"column {column!r} must be a list of message dicts, got {type(value).__name__}: "
            f"{str(value)[:80]!r}; convert it{remedy}"
        )
    messages = [dict(message) for message in value]
    if column == "conversations":
        messages = [_from_sharegpt_message(m, index) for index, m in enumerate(messages)]
    return [with_calls(message, index) for index, message in enumerate(messages)]


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages after the record's system prompt, if it has one."""
    system = record.get("system")
    if system in (None, "", []):
        return messages
    if not isinstance(system, str):
        raise ChatFormatError(
            f"column 'system' must be text, got {type(system).__name__}: {str(system)[:80]!r}; "
            "convert it, or give it as the first message"
        )
    if messages and messages[0].get("role") == "system":
        raise ChatFormatError(
            "the row has a 'system' column and a system message among its messages; keep one"
        )
    return [{"role": "system", "content": system}, *messages]


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
    role = _SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    return {"role": role, "content": out.pop("value"), **out}


def _settings(record: Mapping[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    """Return the record's tools, None if it has none, and its template arguments."""
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = record.get(column)
        if value is not None and not isinstance(value, kind):
            raise ChatFormatError(
                f"column {column!r} must be a {kind.__name__} or JSON text of one, got "
                f"{type(value).__name__}"
            )
    kwargs = record.get("chat_template_kwargs") or {}
    for name in kwargs:
        reserved = name in RESERVED or name == "chat_template"
        if not isinstance(name, str) or reserved or name.endswith("_token"):
            raise ChatFormatError(
                f"the row's chat_template_kwargs set {name!r}, which isn't a row's to choose: "
                "remove it. A template, or its tokens, may be given for all rows, in the option "
                "chat_template_kwargs or with the tokenizer"
            )
    return record.get("tools") or None, kwargs  # a client without tools sends no list of none
