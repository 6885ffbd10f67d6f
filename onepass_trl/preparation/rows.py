"""Conversations to rows: the options, the passes of one, their trees, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.compute as compute
from datasets import Features, List, Value

from onepass_trl.chat.columns import check_columns
from onepass_trl.chat.errors import TOO_DEEP, ChatFormatError
from onepass_trl.chat.messages import Message
from onepass_trl.chat.processing import ProcessingClass, tokenizer_of
from onepass_trl.chat.records import read_conversation, refuse_media
from onepass_trl.chat.rendering import RenderedTurn, render_each_turn
from onepass_trl.chat.turns import InvalidTurn, chosen_turns, valid
from onepass_trl.data import (
    Layout,
    Overflow,
    TokenTree,
    build_tree,
    concatenate,
    limit_passes,
    linearize,
    split_passes,
)
from onepass_trl.data.layout import TOKEN_COLUMNS, trained_ids
from onepass_trl.data.row_check import check_rows
from onepass_trl.passes import Pass
from onepass_trl.preparation.datasets import Maker
from onepass_trl.preparation.given_passes import numbered_passes
from onepass_trl.preparation.nulls import read_record
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.report import Report
from onepass_trl.preparation.round_trip import check_round_trip
from onepass_trl.preparation.sequences import sequence_of

ROW_FEATURES = {
    **{name: List(Value("int32")) for name in TOKEN_COLUMNS},
    "weights": List(Value("float32")),
    "num_turns": Value("int32"),
    "image_spans": List(
        {
            "begin": Value("int32"),
            "end": Value("int32"),
            "path": Value("string"),
            "content": Value("binary"),
        }
    ),
}
LABELS = {"labels": List(Value("int32"))}
"""What code for rows of ``SFTTrainer`` looks at; nothing here does. See `trained_ids`."""


@dataclass(frozen=True, eq=False)
class RenderedRecord:
    """The passes of a record, and why further ones were left out.

    Attributes:
        passes: one for each trained turn.
        numbers: which of the record's turns, or of its given passes, these are, from 0.
        turns: what the passes were rendered from; none for a record of passes.
        messages: the messages of the conversation, as they are stored; none for a record of passes.
        chat_template_kwargs: the arguments of the chat template that they were rendered with.
        invalid: why no exact pass can be made of further turns, or of the record.
    """

    passes: list[Pass]
    numbers: list[int]
    turns: list[RenderedTurn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    invalid: list[str] = field(default_factory=list)

    @property
    def has_reasoning(self) -> bool | None:
        """Whether a trained turn has reasoning; None where turns aren't known."""
        if not self.turns:
            return None
        return any("reasoning_content" in turn.message for turn in self.turns)


def render_record(
    record: Mapping[str, Any],
    tokenizer: ProcessingClass,
    options: PreparationOptions | None = None,
    *,
    features: Features | None = None,
    verify: bool = False,
) -> RenderedRecord:
    """Return the passes of a record: a conversation in any form, one sequence, or given passes.

    Args:
        record: a line of a dataset.
        tokenizer: a tokenizer or processor with a chat template.
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
    kwargs = dict(options.chat_template_kwargs or {})
    turns: Sequence[RenderedTurn | InvalidTurn]
    try:
        record = read_record(
            record, features, options.null_arguments, ignored=options.ignored_columns
        )
        if record.get("passes") is not None:
            refuse_media(record)
            check_columns(record, ("passes",), None, is_whole=True)
            numbered = numbered_passes(record["passes"], options.train_on)
            return RenderedRecord(list(numbered.values()), list(numbered))
        sequence = sequence_of(record, tokenizer_of(tokenizer), options)
        if sequence is not None:
            refuse_media(record)
            return RenderedRecord([sequence], sorted(chosen_turns(options.train_on, 1)))
        if options.completion_only_loss is False:
            raise ChatFormatError(
                "completion_only_loss=False asks for a loss on what the user wrote; of a "
                "conversation what the model generates is trained. Leave completion_only_loss "
                "unset, or use SFTTrainer"
            )
        conversation = read_conversation(record)
        messages = conversation.messages
        kwargs |= conversation.chat_template_kwargs
        turns = render_each_turn(
            messages,
            tokenizer,
            tools=conversation.tools,
            chat_template_kwargs=kwargs,
            train_on=conversation.trained(options.train_on),
        )
    except ChatFormatError as error:
        turns = [InvalidTurn(error)]
    except RecursionError:
        turns = [InvalidTurn(ChatFormatError(TOO_DEEP))]
    kept, invalid = _parted(turns, drops)
    if verify:
        read = [_parsed_back(turn, tokenizer, options) for turn in kept]
        kept, misread = _parted(read, drops and options.verify_rendering is True)
        invalid += misread
    return RenderedRecord(
        passes=[turn.rendered for turn in kept],
        numbers=[turn.number for turn in kept],
        turns=kept,
        messages=messages,
        chat_template_kwargs=kwargs,
        invalid=invalid,
    )


def _parted(
    turns: Sequence[RenderedTurn | InvalidTurn], drops: bool
) -> tuple[list[RenderedTurn], list[str]]:
    """Return the turns less the invalid ones, and why these are; raise the first unless `drops`."""
    kept, invalid = [], []
    for turn in turns:
        if drops and isinstance(turn, InvalidTurn):
            invalid.append(str(turn.error))
        else:
            kept.append(valid(turn))
    return kept, invalid


def _parsed_back(
    turn: RenderedTurn, processing_class: ProcessingClass, options: PreparationOptions
) -> RenderedTurn | InvalidTurn:
    try:
        check_round_trip(turn, processing_class, options.known_templates)
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


@dataclass(frozen=True)
class RowMaker(Maker):
    """Makes the rows of conversations: those of their prefix trees, in the columns of `Layout`.

    Attributes:
        no_images: why the model can't be trained on images, None if it can.
    """

    features = ROW_FEATURES
    written_features: ClassVar[Mapping[str, Any]] = {**ROW_FEATURES, **LABELS}

    no_images: str | None = None

    def make(
        self, record: Mapping[str, Any], index: int, features: Features | None
    ) -> tuple[list[Mapping[str, Any]], Report]:
        """Return the rows of a record, and what was lost of it."""
        rendered = render_record(
            record,
            self.processing_class,
            self.options,
            features=features,
            verify=self.options.verifies(index),
        )
        if self.no_images and any(pass_.images for pass_ in rendered.passes):
            raise ChatFormatError(f"the row has images, but {self.no_images}")
        _, layouts, lost = lay_out(rendered.passes, self.options)
        invalid = [f"row {index}: {problem}" for problem in rendered.invalid]
        return [_written(layout) for layout in layouts], Report(lost, invalid)

    def length(self, row: Mapping[str, Any]) -> int:
        """Return the tokens of a row."""
        return len(row["input_ids"])

    def join(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return one row that holds several, which don't see each other."""
        layouts = [Layout.from_columns(row) for row in rows]
        return _written(concatenate(layouts or [linearize(TokenTree())]))

    @staticmethod
    def check_rows(rows: pyarrow.Table, name: Callable[[int], str]) -> None:
        """Raise ValueError unless the rows are those of trees of passes."""
        columns, lengths = {}, {}
        for column in TOKEN_COLUMNS:
            values = rows[column].combine_chunks()
            if values.null_count or not _is_list(values.type):
                row = values.is_null().index(True).as_py() if values.null_count else 0
                raise ValueError(
                    f"{name(row)} has {column} = {str(values[row])[:80]}, expected a list"
                )
            columns[column] = compute.list_flatten(values).to_numpy(zero_copy_only=False)
            lengths[column] = compute.list_value_length(values).to_numpy().astype(np.int64)
        check_rows(columns, lengths, name)

    def check_prepared(self, rows: pyarrow.Table, name: str) -> None:
        """Raise ValueError for a row that is too long: a tree can't be cut afterwards."""
        length = compute.max(compute.list_value_length(rows["input_ids"])).as_py() or 0
        max_length = self.options.max_length
        if max_length is not None and length > max_length:
            raise ValueError(
                f"a row of the prepared {name} dataset has {length} tokens, but max_length is "
                f"{max_length}: prepare the conversations with this max_length, or raise it"
            )


def _written(row: Layout) -> dict[str, Any]:
    return {**row.columns(), "labels": trained_ids(row)}


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
