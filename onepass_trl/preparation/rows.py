"""Conversations to rows: the options, the passes of one, their trees, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.messages import Message
from onepass_trl.chat.rendering import RenderedTurn, render_each_turn
from onepass_trl.chat.rows import read_conversation
from onepass_trl.chat.turns import InvalidTurn
from onepass_trl.data import (
    Layout,
    Overflow,
    build_tree,
    limit_passes,
    linearize,
    split_passes,
)
from onepass_trl.passes import Pass
from onepass_trl.preparation.given_passes import numbered_passes
from onepass_trl.preparation.nulls import read_record
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.round_trip import check_round_trip

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

_NUM_SHOWN = 5  # invalid turns whose errors are logged


@dataclass(frozen=True, eq=False)
class RenderedRecord:
    """The passes of a record, and why further ones were left out.

    Attributes:
        passes: one for each trained turn.
        numbers: which of the record's turns, or of its given passes, these are, from 0.
        turns: what the passes were rendered from; none for a record of passes.
        messages: the messages of the conversation, as they are stored; none for a record of passes.
        invalid: why no exact pass can be made of further turns, or of the record.
    """

    passes: list[Pass]
    numbers: list[int]
    turns: list[RenderedTurn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    @property
    def has_reasoning(self) -> bool | None:
        """Whether a trained turn has reasoning; None where turns aren't known."""
        if not self.turns:
            return None
        return any("reasoning_content" in turn.message for turn in self.turns)


def render_record(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions | None = None,
    *,
    features: Features | None = None,
    verify: bool = False,
) -> RenderedRecord:
    """Return the passes of a record: a conversation in any form, or passes that are given.

    Args:
        record: a line of a dataset.
        tokenizer: with a chat template.
        options: how it is rendered, and whether turns that can't be are left out; the defaults
            if None.
        features: of the dataset, see `onepass_trl.preparation.nulls.read_record`.
        verify: also parse the turns back, see `onepass_trl.preparation.round_trip`.

    Raises:
        ChatFormatError: for what is not left out. What a sample of the records shows to be parsed
            otherwise isn't, as it may be wrong with all of them.
    """
    options = options or PreparationOptions()
    drops = options.invalid_turns == "drop"
    messages: list[Message] = []
    turns: Sequence[RenderedTurn | InvalidTurn]
    try:
        record = read_record(record, features, options.null_arguments)
        if record.get("passes") is not None:
            numbered = numbered_passes(record["passes"], options.train_on)
            return RenderedRecord(list(numbered.values()), list(numbered))
        conversation = read_conversation(record)
        messages = conversation.messages
        turns = render_each_turn(
            messages,
            tokenizer,
            tools=conversation.tools,
            chat_template_kwargs={
                **(options.chat_template_kwargs or {}),
                **conversation.chat_template_kwargs,
            },
            train_on=conversation.trained(options.train_on),
        )
    except ChatFormatError as error:
        turns = [InvalidTurn(error)]
    kept, invalid = _parted(turns, drops)
    if verify:
        read = [_parsed_back(turn, tokenizer, options) for turn in kept]
        kept, misread = _parted(read, drops and options.verify_rendering is True)
        invalid += misread
    return RenderedRecord(
        [turn.rendered for turn in kept], [turn.number for turn in kept], kept, messages, invalid
    )


def _parted(
    turns: Sequence[RenderedTurn | InvalidTurn], drops: bool
) -> tuple[list[RenderedTurn], list[str]]:
    """Return the turns less the invalid ones, and why these are; raise the first unless `drops`."""
    kept, invalid = [], []
    for turn in turns:
        if isinstance(turn, RenderedTurn):
            kept.append(turn)
        elif drops:
            invalid.append(str(turn.error))
        else:
            raise turn.error
    return kept, invalid


def _parsed_back(
    turn: RenderedTurn, tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> RenderedTurn | InvalidTurn:
    try:
        check_round_trip(turn, tokenizer, options.known_templates)
    except ChatFormatError as error:
        return InvalidTurn(error)
    return turn


def lay_out(
    passes: list[Pass], options: PreparationOptions
) -> tuple[list[Pass], list[Layout], Overflow]:
    """Return the passes that ``max_length`` leaves, their rows, and what was taken away."""
    if not passes:
        return [], [], Overflow()
    if options.max_length is None:
        return passes, [linearize(build_tree(passes))], Overflow(longest=max(map(len, passes)))
    passes, lost = limit_passes(passes, options.max_length, options.overflow)
    trees = split_passes(passes, options.max_length) if passes else []
    return passes, [linearize(tree) for tree in trees], lost


def describe_invalid(invalid: Sequence[str]) -> str:
    """Return in words which turns, or rows without a readable turn, have been left out and why."""
    shown = "".join(f"\n  {problem}" for problem in invalid[:_NUM_SHOWN])
    rest = len(invalid) - _NUM_SHOWN
    return (
        f"no exact pass can be made of {len(invalid)} turns or rows, which are left out:{shown}"
        + (f"\n  and {rest} others" if rest > 0 else "")
    )
