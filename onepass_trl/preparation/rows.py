"""Conversations to rows: the options, the passes of one, their trees, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.families import Family, register_family, registered_families
from onepass_trl.chat.rendering import RenderedTurn, TrainOn
from onepass_trl.chat.rows import NullArguments, numbered_passes, row_to_turns
from onepass_trl.data import (
    Layout,
    Overflow,
    TokenTree,
    build_tree,
    limit_passes,
    linearize,
    split_passes,
)
from onepass_trl.passes import Pass
from onepass_trl.preparation.cache import code_digest
from onepass_trl.preparation.round_trip import (
    KnownTemplates,
    check_round_trip,
    no_response_template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# So many rows of a dataset are parsed back unless `verify_rendering` says otherwise.
NUM_VERIFIED_ROWS = 8
_NUM_SHOWN = 5  # invalid turns whose errors are logged


@dataclass(frozen=True)
class PreparationOptions:
    """How rows are made: see `OnePassSFTConfig` for each."""

    max_length: int | None
    overflow: str
    train_on: TrainOn
    packing: bool
    invalid_turns: str = "error"
    null_arguments: NullArguments = "error"
    chat_template_kwargs: Mapping[str, Any] | None = None
    verify_rendering: bool | None = None
    num_proc: int | None = None
    shuffle_seed: int | None = None
    known_templates: KnownTemplates = no_response_template
    """How answers to a chat template are parsed, where the tokenizer doesn't say it."""
    families: tuple[Family, ...] = field(default_factory=registered_families)
    """The registered families: for the cache, and for processes that don't inherit them."""
    code: str = field(default_factory=code_digest)
    """The cache of `datasets` must not outlive the code that made its rows."""

    def verifies(self, index: int) -> bool:
        """Return whether the row at `index` is parsed back after rendering."""
        if self.verify_rendering is None:
            return index < NUM_VERIFIED_ROWS
        return self.verify_rendering


def register_families(options: PreparationOptions) -> None:
    """Register the families of user code, also in a process that didn't inherit them."""
    for family in reversed(options.families):
        register_family(family)


def make_rows(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    *,
    verify: bool = False,
) -> tuple[list[Layout], Overflow, list[str]]:
    """Return the rows of one conversation, what an overflow policy took away, and why turns were
    left out, see `passes_of`."""
    passes, _, invalid = passes_of(row, tokenizer, options, verify=verify)
    _, trees, lost = trees_of(passes, options)
    return [linearize(tree) for tree in trees], lost, invalid


def passes_of(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    *,
    verify: bool = False,
) -> tuple[list[Pass], list[RenderedTurn] | None, list[str]]:
    """Return the passes of a row, the turns that they are, and why other turns were left out.

    The turns are None for a row of passes. With ``invalid_turns="error"`` none is left out, and
    what is wrong is raised.
    """
    invalid: list[str] = []
    drops = options.invalid_turns == "drop"

    def leave_out(error: ChatFormatError) -> None:
        invalid.append(str(error))

    try:
        if row.get("passes") is not None:
            return list(numbered_passes(row["passes"], options.train_on).values()), None, invalid
        turns = row_to_turns(
            row,
            tokenizer,
            chat_template_kwargs=options.chat_template_kwargs,
            train_on=options.train_on,
            null_arguments=options.null_arguments,
            on_error=leave_out if drops else None,
        )
    except ChatFormatError as error:
        if not drops:
            raise
        leave_out(error)
        return [], [], invalid
    kept = []
    for turn in turns:
        try:
            if verify:
                check_round_trip(turn, tokenizer, options.known_templates)
        except ChatFormatError as error:
            if not (drops and options.verify_rendering):
                raise  # seen in a sample of the rows, it may be wrong with all of them
            leave_out(error)
        else:
            kept.append(turn)
    return [turn.rendered for turn in kept], kept, invalid


def trees_of(
    passes: list[Pass], options: PreparationOptions
) -> tuple[list[Pass], list[TokenTree], Overflow]:
    """Return the passes that ``max_length`` leaves, their trees, and what was taken away."""
    if not passes:
        return [], [], Overflow()
    if options.max_length is None:
        return passes, [build_tree(passes)], Overflow(longest=max(map(len, passes)))
    passes, lost = limit_passes(passes, options.max_length, options.overflow)
    return passes, split_passes(passes, options.max_length) if passes else [], lost


def describe_invalid(invalid: Sequence[str]) -> str:
    """Return in words which turns, or rows without a readable turn, have been left out and why."""
    shown = "".join(f"\n  {problem}" for problem in invalid[:_NUM_SHOWN])
    rest = len(invalid) - _NUM_SHOWN
    return (
        f"no exact pass can be made of {len(invalid)} turns or rows, which are left out:{shown}"
        + (f"\n  and {rest} others" if rest > 0 else "")
    )


def parse_train_on(value: str | Sequence[int]) -> TrainOn:
    """Return what ``train_on`` means: ``"all"``, ``"last"`` or the list of turn indices.

    Raises:
        ValueError: if it means none of these.
    """
    if value == "all":
        return "all"
    if value == "last":
        return "last"
    parsed: object = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
    if isinstance(parsed, list) and all(type(index) is int for index in parsed):
        return parsed
    raise ValueError(
        f"train_on must be 'all', 'last' or a list of turn indices such as [0, 2], got {value!r}"
    )
