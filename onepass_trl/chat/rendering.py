"""One pass for each trained assistant turn of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from onepass_trl.chat.checks import (
    check_generable,
    check_stand_ins,
    end_of_turn,
    with_stand_ins,
)
from onepass_trl.chat.encoding import (
    AddedTokens,
    added_tokens,
    encode_alone,
    encode_behind,
    encode_views,
)
from onepass_trl.chat.errors import ChatFormatError, TemplateRefusal, TurnError
from onepass_trl.chat.families import Family, Turn, family_of
from onepass_trl.chat.messages import Message, normalize_messages, with_text_arguments
from onepass_trl.chat.template import Template
from onepass_trl.chat.unread import check_keys, report_left_out
from onepass_trl.passes import Pass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all", "last"] | Sequence[int]
OnError = Callable[[ChatFormatError], None]


def render_passes(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: TrainOn = "all",
) -> list[Pass]:
    """Return one pass for each trained assistant turn, in order.

    A pass is what inference sees and then must generate. The context of a turn is what
    ``tokenizer.apply_chat_template(messages[:index], tools=tools, add_generation_prompt=True,
    **chat_template_kwargs)`` gives. The completion is tokenized by itself and trained through the
    end-of-turn token, where the pass ends.

    Args:
        messages: Messages in the OpenAI form. Reasoning may stand in ``reasoning_content``,
            ``reasoning``, ``thinking``, or as ``<think>..</think>`` at the start of the content;
            arguments of tool calls may be dicts or JSON text. ``"train": False`` in an assistant
            message switches its turn off.
        tokenizer: A tokenizer with a chat template.
        tools: Tools as ``apply_chat_template`` takes them.
        chat_template_kwargs: Further arguments of the template, such as ``{"enable_thinking":
            True}``.
        train_on: Which assistant turns are trained: ``"all"``, ``"last"``, or their numbers among
            the assistant turns of the conversation, from 0; negative ones count from the end.

    Raises:
        ChatFormatError: if no turn is left to train; if a message can't be understood; if a trained
            turn has nothing before it; or if its reasoning, content or tool calls would not all
            stand in its own pass. The message names the turn and the template family.
    """
    turns = render_turns(
        messages,
        tokenizer,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        train_on=train_on,
    )
    return [turn.rendered for turn in turns]


@dataclass(frozen=True)
class TurnTexts:
    """A trained turn as text, and what it was rendered from.

    Attributes:
        message: The turn's message in its normal form, see
            :func:`onepass_trl.chat.messages.normalize_messages`.
        index: Index of that message in the conversation.
        context: What inference would feed before the turn.
        completion: What the model must generate behind it.
        name: What to call the turn in messages.
        template: The Jinja source of the chat template.
        tools: The tools, or None.
    """

    message: Message
    index: int
    context: str
    completion: str
    name: str
    template: str
    tools: Sequence[Any] | None


@dataclass(frozen=True)
class RenderedTurn(TurnTexts):
    """A trained turn as text and as the pass that this is, tokenized.

    Attributes:
        rendered: The pass.
    """

    rendered: Pass


def render_turns(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: TrainOn = "all",
    on_error: OnError | None = None,
) -> list[RenderedTurn]:
    """Return the passes of :func:`render_passes`, each with the message that it was made from.

    Arguments and errors are those of :func:`render_passes`. Given `on_error`, it is called with the
    error of each turn from which no pass can be made, and the turn is left out.
    """
    added = added_tokens(tokenizer)
    template = Template(tokenizer, tools, chat_template_kwargs)
    conversation, trained = _read(messages, template, added, train_on)
    turns = conversation.turns(trained, on_error)
    if not turns:
        return []
    contexts = [turn.context for turn in turns]
    completions = [turn.completion for turn in turns]
    # What a turn generates stands in later contexts too, as a rule: its pieces are encoded once.
    alone = [] if added.prepends else completions
    ids = encode_views(tokenizer, added, [*contexts, *alone])
    context_ids, completion_ids = ids[: len(contexts)], ids[len(contexts) :]
    if added.prepends:
        completion_ids = [
            encode_behind(tokenizer, context, completion)
            for context, completion in zip(contexts, completions, strict=True)
        ]
    [first_ids] = encode_alone(tokenizer, contexts[:1])
    if not np.array_equal(context_ids[0], first_ids):
        raise AssertionError(f"the pieces of a text don't give its ids with {tokenizer!r}")
    return [
        RenderedTurn(
            **vars(turn),
            rendered=Pass(
                np.concatenate(parts), np.repeat([False, True], [ids.size for ids in parts])
            ),
        )
        for turn, *parts in zip(turns, context_ids, completion_ids, strict=True)
    ]


class AnswerRenderer:
    """Renders several answers to the same messages, and the messages only once.

    Args:
        messages: The messages before the answers.
        tokenizer: As for `render_turns`, like the other arguments.
        tools: The tools.
        chat_template_kwargs: Further arguments of the template.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._messages = list(messages)
        self._added = added_tokens(tokenizer)
        self._template = Template(tokenizer, tools, chat_template_kwargs)
        self._first: _Conversation | None = None

    def render(self, answer: Mapping[str, Any]) -> TurnTexts:
        """Return the turn of an assistant's message behind the messages.

        Raises:
            ChatFormatError: as `render_turns` does.
        """
        messages = [*self._messages, answer]
        conversation, trained = _read(messages, self._template, self._added, "last")
        if self._first is None:
            self._first = conversation
        else:
            conversation.share(self._first)
        [turn] = conversation.turns(trained)
        return turn


def _read(
    messages: Sequence[Mapping[str, Any]],
    template: Template,
    added: AddedTokens,
    train_on: TrainOn,
) -> tuple[_Conversation, list[tuple[int, int]]]:
    """Return the conversation, and number and message index of each turn to train."""
    family = family_of(template.text)
    normal = normalize_messages(messages, inline_reasoning=family.reads_reasoning(template.text))
    trained = _trained_turns(normal, train_on)
    return _Conversation(template, family, added, normal), trained


def _trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[tuple[int, int]]:
    """Return number and message index of each turn to train; takes out the ``train`` flags."""
    flags = [message.pop("train", True) for message in messages]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ChatFormatError(
            f"none of the {len(messages)} messages is from the assistant, so there is nothing to "
            "train; remove the conversation or add an assistant message"
        )
    chosen = chosen_turns(train_on, len(turns))
    trained = [
        (number, index) for number, index in enumerate(turns) if number in chosen and flags[index]
    ]
    if not trained:
        raise ChatFormatError(
            f"train_on={train_on!r} and the messages' 'train' flags leave none of the {len(turns)} "
            "assistant turns to train; remove the conversation or change them"
        )
    return trained


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
                f"train_on lists turn {number}, but the conversation has {num_turns} assistant "
                f"turns, {-num_turns}..{num_turns - 1}"
            )
    return {int(number) % num_turns for number in train_on}


class _Conversation:
    """The texts of a conversation's turns, from messages in their normal and in prepared form."""

    def __init__(
        self, template: Template, family: Family, added: AddedTokens, messages: Sequence[Message]
    ) -> None:
        self.template = template
        self._family = family
        self._added = added
        self.messages = messages
        self._prepared = [self._prepare(message) for message in messages]
        self._contexts: dict[int, str] = {}
        self._checked: set[tuple[str, bool, bool, int]] = set()

    def share(self, other: _Conversation) -> None:
        """Take over what is known of a conversation that differs in its last message only."""
        self._contexts, self._checked = other._contexts, other._checked

    def _prepare(self, message: Message) -> Message:
        """Return the message as the template takes it."""
        if "tool_calls" in message and self.template.takes_text_arguments:
            return with_text_arguments(message)
        return message

    def turns(
        self, trained: Sequence[tuple[int, int]], on_error: OnError | None = None
    ) -> list[TurnTexts]:
        """Return turns as text, checked, each through its end-of-turn token.

        Args:
            trained: Number and message index of each turn, in order.
            on_error: As for `render_turns`.
        """
        check_keys(self.template, self.messages)
        turns = []
        for number, index in trained:
            try:
                turns.append(self._turn(number, index))
            except ChatFormatError as error:
                if on_error is None:
                    raise
                on_error(error)
        if turns:
            last = turns[-1]
            before = (self.messages[: last.index], self._prepared[: last.index])
            report_left_out(self.template, *before, last.context)
        return turns

    def _turn(self, number: int, index: int) -> TurnTexts:
        name = f"assistant turn {number} (message {index}, template family {self._family.name})"
        try:
            self._check_message(index)
            context, completion = self._rendered(index)
        except TurnError as error:
            raise ChatFormatError(f"{name}: {error}") from error
        return TurnTexts(
            message=self.messages[index],
            index=index,
            context=context,
            completion=completion,
            name=name,
            template=self.template.text,
            tools=self.template.tools,
        )

    def _rendered(self, index: int) -> tuple[str, str]:
        try:
            return self._texts(index)
        except TemplateRefusal as refusal:
            problem = f"the template refuses the messages up to it: {refusal}"
            for part, remedy in self._family.remedies.items():
                if part in problem:
                    problem += f" ({remedy})"
        except TurnError as error:
            problem = str(error)
        if self.messages[index - 1]["role"] == "assistant":
            problem += (
                "; the message before it is from the assistant too, which most templates can't "
                "continue: join the two, or put a user or tool message between them"
            )
        raise TurnError(problem)

    def _check_message(self, index: int) -> None:
        """Check what doesn't take the template to see."""
        message = self.messages[index]
        check_generable(
            message,
            self._added.special,
            self.template.text,
            reads_reasoning=self._family.reads_reasoning(self.template.text),
        )
        if not (message["content"] or message.keys() & {"reasoning_content", "tool_calls"}):
            raise TurnError(
                "it is empty: no reasoning, content or tool call, so the model would learn to "
                "answer nothing; remove it, or switch it off with 'train': false"
            )
        if index == 0:
            raise TurnError(_NOTHING_BEFORE)

    def _texts(self, index: int) -> tuple[str, str]:
        message = self.messages[index]
        context = self._contexts.get(index)
        if context is None:
            context = self.template.render(self._prepared[:index], prompt=True)
            self._contexts[index] = context
        if not context:
            raise TurnError(_NOTHING_BEFORE)
        turn = Turn(self.template, self._prepared[: index + 1], context)
        completion = self._family.completion(turn)
        end = end_of_turn(completion, message, self._added.special)
        self._check_shape(index, context)
        return context, completion[:end]

    def _check_shape(self, index: int, context: str) -> None:
        """Check that the template writes each field of such a turn, once for turns alike."""
        message = self.messages[index]
        shape = (
            self.messages[index - 1]["role"],
            "reasoning_content" in message,
            bool(message["content"]),
            len(message.get("tool_calls", ())),
        )
        if shape in self._checked:
            return
        other, texts = with_stand_ins(message)
        messages = [*self._prepared[:index], self._prepare(other)]
        check_stand_ins(self._family.completion(Turn(self.template, messages, context)), texts)
        self._checked.add(shape)


_NOTHING_BEFORE = (
    "nothing stands before it, so there is no context from which it could be generated; put a "
    "system or user message before it, or switch it off with 'train': false"
)
