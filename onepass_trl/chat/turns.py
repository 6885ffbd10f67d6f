"""Turns of conversations as text, checked: what inference sees and the model must generate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from onepass_trl.chat.checks import (
    after_stand_ins,
    check_generable,
    check_marks,
    check_stand_ins,
    end_of_turn,
    mentions_marks,
    with_stand_ins,
    without_prompt,
)
from onepass_trl.chat.closing import ClosingMarks
from onepass_trl.chat.encoding import Ids, added_tokens
from onepass_trl.chat.endings import Ending, find_ending
from onepass_trl.chat.errors import ChatFormatError, TemplateRefusal, TurnError
from onepass_trl.chat.families import Turn, family_of
from onepass_trl.chat.images import ImageContent, images_of, put_images
from onepass_trl.chat.joining import Joined, join_turns
from onepass_trl.chat.marks import THINK_CLOSE, THINK_OPEN
from onepass_trl.chat.messages import Message, normalize_messages, with_text_arguments
from onepass_trl.chat.processing import ProcessingClass, tokenizer_of
from onepass_trl.chat.template import Template
from onepass_trl.chat.unread import check_keys, report_left_out
from onepass_trl.passes import ImageSource, ImageSpan
from onepass_trl.vision import ImageError, vision_of
from onepass_trl.wording import counted

TrainOn: TypeAlias = Literal["all", "last"] | Sequence[int]
Turns = TypeVar("Turns")

_NOTHING_BEFORE = (
    "nothing stands before it, so there is no context from which it could be generated; put a "
    "system or user message before it, or switch it off with 'train': false"
)
_CONSECUTIVE = (
    "the message {} it is from the assistant too, and generation would go on from one to the "
    "other: join the two, or put a user or tool message between them"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TurnTexts:
    """A trained turn as text, and what it was rendered from.

    Attributes:
        messages: The messages of the conversation up to and including the turn's own, in their
            normal form, see :func:`onepass_trl.chat.messages.normalize_messages`. Those that are
            parts of one turn are joined.
        number: The turn's number among the assistant messages of the conversation, from 0; that of
            its last part if it was joined.
        context: What inference would feed before the turn, with a placeholder for each image.
        completion: What the model must generate after it.
        name: What to call the turn in messages.
        template: The Jinja source of the chat template.
        tools: The tools, or None.
    """

    messages: Sequence[Message]
    number: int
    context: str
    completion: str
    name: str
    template: str
    tools: Sequence[Any] | None

    @property
    def message(self) -> Message:
        """The turn's own message."""
        return self.messages[-1]

    @property
    def index(self) -> int:
        """Index of the turn's own message in `messages`."""
        return len(self.messages) - 1


@dataclass(frozen=True)
class InvalidTurn:
    """A turn from which no exact pass can be made.

    Attributes:
        error: Says which turn it is, and why.
    """

    error: ChatFormatError


def valid(turn: Turns | InvalidTurn) -> Turns:
    """Return the turn, or raise the error of an invalid one."""
    if isinstance(turn, InvalidTurn):
        raise turn.error
    return turn


@dataclass
class TurnContext:
    """Messages before a turn, in their normal form and as the template takes them."""

    template: Template
    messages: Sequence[Message]
    prepared: Sequence[Message]

    def up_to(self, index: int) -> TurnContext:
        """Return the context that the first `index` messages are."""
        return TurnContext(self.template, self.messages[:index], self.prepared[:index])

    @cached_property
    def text(self) -> str:
        """What inference would feed before the turn.

        Raises:
            TemplateRefusal: if the template raises an error for these messages.
        """
        return self.template.render(self.prepared, prompt=True)

    def report_left_out(self) -> None:
        """Log what of the messages the template leaves out."""
        report_left_out(self.template, self.messages, self.prepared, self.text)


class TurnRenderer:
    """Turns as text, checked; what turns of the same shape have in common is checked once."""

    def __init__(
        self,
        processing_class: ProcessingClass,
        tools: Sequence[Any] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.tokenizer = tokenizer_of(processing_class)
        self.added = added_tokens(self.tokenizer)
        self._template = Template(processing_class, tools, chat_template_kwargs)
        self._eos = self.tokenizer.eos_token
        self._family = family_of(self._template)
        self._reads_reasoning = self._family.reads_reasoning(self._template)
        self._has_marks = THINK_CLOSE in self._template.source.texts
        self._forms: dict[_Shape, _Form] = {}
        self._vision = vision_of(processing_class)
        self._image_tokens: dict[ImageSource, Ids] = {}

    def read(
        self, messages: Sequence[Mapping[str, Any]], train_on: TrainOn
    ) -> tuple[list[Message], list[TurnToTrain]]:
        """Return the messages in their normal form, parts of a turn joined, and what to train."""
        normal = normalize_messages(
            messages,
            inline_reasoning=self._reads_reasoning,
            part_separator=lambda: self._template.part_separator,
        )
        for index, message in enumerate(normal):
            self._read_images(index, images_of([message]))
        joined = join_turns(normal)
        trained = _turns_to_train(joined, _trained_turns(normal, train_on))
        for message, _ in joined:
            message.pop("train", None)
        together = [message for message, _ in joined]
        check_keys(self._template, together)
        return together, trained

    def _read_images(self, index: int, images: Sequence[ImageSource]) -> None:
        if images and self._vision is None:
            raise ChatFormatError(
                f"message {index} has an image, but {type(self.tokenizer).__name__} can't process "
                "images: pass the processor of a model that sees them, or remove the image"
            )
        for number, image in enumerate(images):
            try:
                self._image_tokens[image] = self._tokens_of(image)
            except ImageError as error:
                raise ChatFormatError(f"message {index}, image {number}: {error}") from error

    def _tokens_of(self, image: ImageSource) -> Ids:
        """Return the ids that the processor puts in the place of an image's placeholder."""
        assert self._vision is not None
        ids = self._vision.tokens(image)
        ends = self.tokenizer.convert_ids_to_tokens(ids[[0, -1]].tolist())
        boundary = self.added.boundary
        if boundary is None or not all(map(boundary.fullmatch, [*ends, self._vision.placeholder])):
            raise ImageError(
                f"the tokens of an image ({ends[0]!r} to {ends[1]!r}) must begin and end in added "
                "tokens at which the tokenizer cuts texts, as those of other processors do"
            )
        return ids

    def with_surroundings(self, context: str) -> str:
        """Return the text of a context as it is tokenized, see `Vision.around`."""
        return context if self._vision is None else self._vision.with_surroundings(context)

    def with_images(self, token_ids: Ids, turn: TurnTexts) -> tuple[Ids, list[ImageSpan]]:
        """Return the context of a turn with the tokens of its images, and where these are.

        Args:
            token_ids: ``(num_tokens,)``, of its text.
            turn: The turn.
        """
        images = [(image, self._image_tokens[image]) for image in images_of(turn.messages)]
        if not images:
            return token_ids, []
        assert self._vision is not None
        return put_images(token_ids, self._vision.placeholder_id, images)

    def context(self, messages: Sequence[Message]) -> TurnContext:
        """Return messages in their normal form as a context."""
        return TurnContext(self._template, messages, [self._prepare(m) for m in messages])

    def _prepare(self, message: Message) -> Message:
        """Return the message as the template takes it."""
        if "tool_calls" in message and self._template.takes_text_arguments:
            message = with_text_arguments(message)
        content = message["content"]
        if isinstance(content, ImageContent):
            message = {**message, "content": content.for_template()}
        elif self._template.takes_only_parts:
            message = {**message, "content": [{"type": "text", "text": content}]}
        return message

    def turns(
        self, messages: Sequence[Message], trained: Sequence[TurnToTrain]
    ) -> list[TurnTexts | InvalidTurn]:
        """Return the trained turns of messages in their normal form."""

        def read() -> list[TurnTexts | InvalidTurn]:
            self._forms.clear()
            whole = self.context(messages)
            return [
                self.turn(whole.up_to(turn.index), messages[turn.index], turn) for turn in trained
            ]

        return self._template.sharing_views(read)

    def turn(
        self, context: TurnContext, message: Message, turn: TurnToTrain
    ) -> TurnTexts | InvalidTurn:
        """Return the turn of a message after its context, through its end-of-turn token."""
        name = (
            f"assistant turn {turn.number} (message {turn.given_index}, template family "
            f"{self._family.name})"
        )
        try:
            if turn.goes_on:
                raise TurnError(_CONSECUTIVE.format("after"))
            completion = self._checked_completion(context, message)
        except TurnError as error:
            invalid = ChatFormatError(f"{name}: {error}")
            invalid.__cause__ = error
            return InvalidTurn(invalid)
        return TurnTexts(
            messages=[*context.messages, message],
            number=turn.number,
            context=context.text,
            completion=completion,
            name=name,
            template=self._template.text,
            tools=self._template.tools,
        )

    def _checked_completion(self, context: TurnContext, message: Message) -> str:
        # What doesn't take the template to see is checked first.
        check_generable(
            message,
            self.added.special,
            reads_reasoning=self._reads_reasoning,
            has_marks=self._has_marks,
        )
        if not (message["content"].strip() or message.keys() & {"reasoning_content", "tool_calls"}):
            raise TurnError(
                "it is empty: no reasoning, content or tool call, so the model would learn to "
                "answer nothing; remove it, or switch it off with 'train': false"
            )
        if not context.messages:
            raise TurnError(_NOTHING_BEFORE)
        if context.messages[-1]["role"] == "assistant":
            raise TurnError(_CONSECUTIVE.format("before"))
        try:
            return self._completion(context, message)
        except TemplateRefusal as refusal:
            problem = f"the template refuses the messages up to it: {refusal}"
            for part, remedy in self._family.remedies.items():
                if part in problem:
                    problem += f" ({remedy})"
            raise TurnError(problem) from refusal

    def _completion(self, context: TurnContext, message: Message) -> str:
        if not context.text:
            raise TurnError(_NOTHING_BEFORE)
        self._check_places(context)
        completion = self._written(context, message)
        shape = _Shape.of(context, message)
        if shape not in self._forms:
            self._forms[shape] = self._form(context, message)
        form = self._forms[shape]
        completion = form.ending.cut(completion)
        form.closing_marks.check(message, completion)
        if not mentions_marks(message):
            check_marks(context.text, completion)
        generated = without_prompt(context.text, message)
        tag = form.closing_marks.content
        return completion[: end_of_turn(completion, generated, self.added.special, tag)]

    def _check_places(self, context: TurnContext) -> None:
        """Raise TurnError unless a context has a placeholder for each image before it."""
        if self._vision is None:
            return
        placeholder, images = self._vision.placeholder, images_of(context.messages)
        num_places = context.text.count(placeholder)
        if num_places != len(images):
            raise TurnError(
                f"the text before it has {counted(num_places, 'time')} {placeholder!r}, the place "
                f"of an image, and the messages have {counted(len(images), 'image')}: use a chat "
                "template that writes it once for each image, and remove it from the texts of "
                "messages"
            )

    def _written(self, context: TurnContext, message: Message) -> str:
        """Return what the template writes for a message after its context."""
        messages = [*context.prepared, self._prepare(message)]
        return self._family.completion(Turn(self._template, messages, context.text))

    def _form(self, context: TurnContext, message: Message) -> _Form:
        """Return how turns like this one are written, having checked that all of their fields are.

        Raises:
            TurnError: if it doesn't.
        """
        other, texts = with_stand_ins(message)
        completion = self._written(context, other)
        check_stand_ins(completion, other, texts, reads_reasoning=self._reads_reasoning)
        check_marks(context.text, completion)
        if not (texts.keys() - {"its reasoning"}):  # of which later contexts may have nothing
            other, texts = with_stand_ins({**other, "content": "some"})
            completion = self._written(context, other)
        last = after_stand_ins(completion, texts) or ""
        after = map(self._prepare, [other, *_next_messages(other)])
        messages = [*context.prepared, *after]
        try:
            followed = after_stand_ins(self._template.render(messages, prompt=False), texts)
        except TemplateRefusal:  # it takes one question
            followed = None
        if followed is None:
            followed = last
        ending = find_ending(last, followed, self.added.special, self._eos, context.text)
        return _Form(ending, ClosingMarks.of(completion.removesuffix(ending.extra), texts))


@dataclass(frozen=True)
class TurnToTrain:
    """Which turn of a conversation is trained.

    Attributes:
        number: Its number among the assistant messages as given, from 0.
        index: The index of its message, parts of a turn joined.
        given_index: The index of its message, or last part, as given.
        goes_on: Whether the next message is from the assistant too.
    """

    number: int
    index: int
    given_index: int
    goes_on: bool


class _Shape(NamedTuple):
    """What turns have in common that a template writes alike."""

    role_before: str
    prompt: str
    has_reasoning: bool
    has_content: bool
    has_inline_reasoning: bool
    num_calls: int

    @classmethod
    def of(cls, context: TurnContext, message: Message) -> _Shape:
        """Return the shape of a message after its context."""
        prompt = context.text.rstrip()
        content = message["content"].strip()
        return cls(
            context.messages[-1]["role"],
            next((mark for mark in (THINK_OPEN, THINK_CLOSE) if prompt.endswith(mark)), ""),
            bool(message.get("reasoning_content", "").strip()),
            bool(content),
            content.startswith(THINK_OPEN),
            len(message.get("tool_calls", ())),
        )


class _Form(NamedTuple):
    """How a template writes turns of one shape."""

    ending: Ending
    closing_marks: ClosingMarks


def _next_messages(message: Message) -> list[Message]:
    """Return messages that may come after this one: results of its calls, or a question."""
    calls = message.get("tool_calls", ())
    return [
        {
            "role": "tool",
            "name": call["function"]["name"],
            "tool_call_id": call.get("id", ""),
            "content": "some",
        }
        for call in calls
    ] or [{"role": "user", "content": "some"}]


def _trained_turns(messages: Sequence[Message], train_on: TrainOn) -> dict[int, int]:
    """Return the number of each assistant message to train by its index."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ChatFormatError(
            f"the conversation has {counted(len(messages), 'message')}, none from the assistant, "
            "so there is nothing to train; remove the conversation or add an assistant message"
        )
    chosen = chosen_turns(train_on, len(turns))
    trained = {
        index: number
        for number, index in enumerate(turns)
        if number in chosen and messages[index].get("train", True)
    }
    if not trained:
        raise ChatFormatError(
            f"train_on={train_on!r} and the messages' 'train' flags leave nothing to train of "
            f"{counted(len(turns), 'assistant turn')}; remove the conversation or change them"
        )
    return trained


def _turns_to_train(joined: Sequence[Joined], trained: Mapping[int, int]) -> list[TurnToTrain]:
    """Return the turns whose messages, the keys of `trained`, are trained."""
    turns = []
    for index, (_, given) in enumerate(joined):
        parts = [part for part in given if part in trained]
        if not parts:
            continue
        if len(parts) < len(given):
            raise ChatFormatError(
                f"messages {given[0]} to {given[-1]} are one turn of the assistant, of which only "
                f"a part would be trained: train all of them or none, or put a user or tool "
                "message between them"
            )
        following = joined[index + 1].message if index + 1 < len(joined) else {"role": None}
        goes_on = following["role"] == "assistant"
        turns.append(TurnToTrain(trained[parts[-1]], index, parts[-1], goes_on))
    return turns


def chosen_turns(train_on: TrainOn, num_turns: int) -> set[int]:
    """Return the numbers, from 0, of the turns that `train_on` means.

    Raises:
        ChatFormatError: if it is none of the accepted forms, or lists a turn that isn't there.
    """
    if train_on == "all":
        return set(range(num_turns))
    if train_on == "last":
        return {num_turns - 1}
    if isinstance(train_on, (str, bytes)) or not isinstance(train_on, Iterable):
        raise ChatFormatError(
            f"train_on must be 'all', 'last' or a list of turn numbers, got {train_on!r}"
        )
    for number in train_on:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ChatFormatError(f"train_on must list whole turn numbers, got {number!r}")
        if not -num_turns <= number < num_turns:
            raise ChatFormatError(
                f"train_on lists turn {number}, but the conversation has "
                f"{counted(num_turns, 'assistant turn')}, {-num_turns}..{num_turns - 1}"
            )
    return {int(number) % num_turns for number in train_on}
