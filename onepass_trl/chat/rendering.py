"""One pass for each trained assistant turn of a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onepass_trl.chat.encoding import Ids, encode_after, encode_alone, encode_views
from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.images import images_of
from onepass_trl.chat.processing import ProcessingClass
from onepass_trl.chat.turns import InvalidTurn, TrainOn, TurnContext, TurnRenderer, TurnTexts, valid
from onepass_trl.passes import ImageSpan, Pass


def render_passes(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: ProcessingClass,
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
        messages: Messages in the OpenAI form. Reasoning may be in ``reasoning_content``,
            ``reasoning``, ``thinking``, or as ``<think>..</think>`` at the start of the content;
            arguments of tool calls may be dicts or JSON text. ``"train": False`` in an assistant
            message switches its turn off.
        tokenizer: A tokenizer or processor with a chat template.
        tools: Tools as ``apply_chat_template`` takes them.
        chat_template_kwargs: Further arguments of the template, such as ``{"enable_thinking":
            True}``.
        train_on: Which assistant turns are trained: ``"all"``, ``"last"``, or their numbers among
            the assistant turns of the conversation, from 0; negative ones count from the end.

    Raises:
        ChatFormatError: if no turn is left to train; if a message can't be understood; if a trained
            turn has nothing before it; or if its reasoning, content or tool calls would not all
            be in its own pass. The message names the turn and the template family.
    """
    turns = render_each_turn(
        messages,
        tokenizer,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        train_on=train_on,
    )
    return [valid(turn).rendered for turn in turns]


@dataclass(frozen=True)
class RenderedTurn(TurnTexts):
    """A trained turn as text and as the pass that this is, tokenized.

    Attributes:
        rendered: The pass.
    """

    rendered: Pass


def render_each_turn(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: ProcessingClass,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: TrainOn = "all",
) -> list[RenderedTurn | InvalidTurn]:
    """Return each trained turn with the pass of :func:`render_passes`, or why it has none.

    Raises:
        ChatFormatError: for what concerns all turns: none is left to train, or a message can't be
            understood.
    """
    renderer = TurnRenderer(tokenizer, tools, chat_template_kwargs)
    normal, trained = renderer.read(messages, train_on)
    turns = renderer.turns(normal, trained)
    valid = [turn for turn in turns if isinstance(turn, TurnTexts)]
    if valid:
        renderer.context(normal[: valid[-1].index]).report_left_out()
    passes = iter(_passes(valid, renderer))
    return [
        RenderedTurn(**vars(turn), rendered=next(passes)) if isinstance(turn, TurnTexts) else turn
        for turn in turns
    ]


def render_answers(
    messages: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    tokenizer: ProcessingClass,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TurnTexts | InvalidTurn]:
    """Return the turn of each answer to the messages, or why no exact pass can be made of it.

    Each is the last turn of ``[*messages, answer]``; what comes before it is rendered once.

    Raises:
        ChatFormatError: for what doesn't depend on the messages, such as a missing template.
    """
    renderer = TurnRenderer(tokenizer, tools, chat_template_kwargs)
    context: TurnContext | None = None
    turns: list[TurnTexts | InvalidTurn] = []
    for answer in answers:
        try:
            normal, [last] = renderer.read([*messages, answer], "last")
        except ChatFormatError as error:
            turns.append(InvalidTurn(error))
            continue
        if images_of(normal):
            raise ChatFormatError(
                "the question has images, but several answers to one question can only be trained "
                "without: train each answer as a conversation, or remove the images"
            )
        context = context or renderer.context(normal[: last.index])
        turns.append(renderer.turn(context, normal[last.index], last))
    if context and any(isinstance(turn, TurnTexts) for turn in turns):
        context.report_left_out()
    return turns


def _passes(turns: Sequence[TurnTexts], renderer: TurnRenderer) -> list[Pass]:
    """Return the pass of each turn of a conversation, tokenized."""
    if not turns:
        return []
    tokenizer, added = renderer.tokenizer, renderer.added
    contexts = [renderer.with_surroundings(turn.context) for turn in turns]
    completions = [turn.completion for turn in turns]
    # What a turn generates appears in later contexts too, as a rule: its pieces are encoded once.
    alone = [] if added.prepends else completions
    ids = encode_views(tokenizer, added, [*alone, *contexts])
    completion_ids = list(itertools.islice(ids, len(alone)))
    if added.prepends:
        completion_ids = [
            encode_after(tokenizer, context, completion)
            for context, completion in zip(contexts, completions, strict=True)
        ]
    context_ids = list(ids)
    [first_ids] = encode_alone(tokenizer, contexts[:1])
    if not np.array_equal(context_ids[0], first_ids):
        raise AssertionError(f"the pieces of a text don't give its ids with {tokenizer!r}")
    return [
        _pass(*renderer.with_images(context, turn), completion)
        for context, turn, completion in zip(context_ids, turns, completion_ids, strict=True)
    ]


def _pass(context: Ids, images: Sequence[ImageSpan], completion: Ids) -> Pass:
    trained = np.zeros(context.size + completion.size, dtype=np.bool_)
    trained[context.size :] = True
    return Pass(np.concatenate([context, completion]), trained, images)
