"""Datasets of questions with several completions to datasets of trace sets, with `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as compute
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from onepass_trl.data import Overflow, build_tree, limit_passes, pack
from onepass_trl.data.packing import PassTooLongError
from onepass_trl.passes import Pass
from onepass_trl.preparation.datasets import (
    AnyDataset,
    check_no_transform,
    check_not_text,
    has_tokens,
    pack_and_shuffle,
    render_rows,
    report_unverified,
)
from onepass_trl.preparation.options import PreparationOptions, register_families
from onepass_trl.setsft.collator import SET_COLUMNS, from_row, to_row
from onepass_trl.setsft.rendering import ForkingTokens, render_traces
from onepass_trl.setsft.traces import Trace, TraceSet

logger = logging.getLogger(__name__)

EXCESS_POLICIES = ("error", "split")

_SET_FEATURES = {name: List(Value("int32")) for name in SET_COLUMNS} | {
    "trained": List(Value("bool"))
}


@dataclass
class Report:
    """What became of the completions of a row, beside being trained.

    Attributes:
        num_repeated: traces that are equal to an earlier one of their question; they are kept.
        num_split: questions whose traces were split into several sets.
    """

    num_repeated: int = 0
    num_split: int = 0


_REPORT_COLUMNS = tuple(asdict(Overflow()) | asdict(Report()))
_RENDERED_FEATURES = {**_SET_FEATURES, **{name: Value("int64") for name in _REPORT_COLUMNS}}


@dataclass(frozen=True)
class SetOptions:
    """How sets are made: see `SetSFTConfig` for each."""

    rows: PreparationOptions
    tokens: ForkingTokens
    excess_traces: str


def is_prepared(column_names: list[str]) -> bool:
    """Return whether a dataset with these columns already consists of sets."""
    return set(SET_COLUMNS) <= set(column_names)


def prepare_dataset(
    dataset: AnyDataset,
    column_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: SetOptions,
    name: str,
) -> AnyDataset:
    """Return `dataset` as rows of `SET_COLUMNS`, one question each, or several where packed.

    Args:
        dataset: questions with completions, see `render_traces`, or rows of such columns.
        column_names: its columns; they are removed.
        name: what to call the dataset in messages and progress bars.

    Raises:
        ValueError: if a row can't be rendered; the message names it. If nothing is left to train.
    """
    check_no_transform(dataset, name)
    streaming = isinstance(dataset, IterableDataset)
    dataset = dataset.with_format(None)

    def described(text: str) -> dict[str, Any]:
        if streaming:
            return {}
        return {"num_proc": options.rows.num_proc, "desc": f"{text} {name} dataset"}

    if is_prepared(column_names):
        check_not_text(dataset, SET_COLUMNS, name)
        _check_prepared(dataset, options, name)
    else:
        dataset = _render(dataset, column_names, tokenizer, options, name, described)
    dataset = dataset.select_columns(list(SET_COLUMNS))
    return pack_and_shuffle(dataset, options.rows, _pack_batch, _SET_FEATURES, described("Packing"))


def _check_prepared(dataset: AnyDataset, options: SetOptions, name: str) -> None:
    """Raise for prepared sets that don't suit the options: they can't be changed afterwards."""
    if isinstance(dataset, IterableDataset):
        return
    for column, limit, what, option in (
        ("trace_lengths", options.rows.max_length, "tokens in a trace", "max_length"),
        ("set_sizes", len(options.tokens.ids), "traces in a set", "num_forking_tokens"),
    ):
        values = dataset.select_columns(column).with_format("arrow")[:][column]
        largest = compute.max(compute.list_flatten(values)).as_py() or 0
        if limit is not None and largest > limit:
            raise ValueError(
                f"the prepared {name} dataset has {largest} {what}, but {option} is {limit}: raise "
                f"it, or prepare the questions with this {option}"
            )


def _render(
    dataset: AnyDataset,
    column_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: SetOptions,
    name: str,
    described: Callable[[str], dict[str, Any]],
) -> AnyDataset:
    report_unverified(tokenizer, options.rows, name)
    rendered = render_rows(
        dataset,
        column_names,
        _render_batch,
        _RENDERED_FEATURES,
        described("Rendering"),
        tokenizer=tokenizer,
        options=options,
        name=name,
    )
    if isinstance(rendered, Dataset):
        columns = {column: rendered.data[column].to_numpy() for column in _REPORT_COLUMNS}
        totals = {column: int(values.sum()) for column, values in columns.items()}
        totals["longest"] = int(columns["longest"].max(initial=0))
        _warn(totals, options.rows, f"{name} dataset")
        if not totals["num_lost_turns"]:
            return rendered
    rendered = rendered.filter(
        has_tokens, input_columns="input_ids", **described("Dropping empty rows of")
    )
    if next(iter(rendered), None) is None:
        raise ValueError(
            f"the {name} dataset has no trace left to train: all are longer than "
            f"max_length={options.rows.max_length}, and overflow={options.rows.overflow!r}. Raise "
            "max_length"
        )
    return rendered


def make_sets(
    record: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    options: SetOptions,
    features: Features | None = None,
) -> tuple[list[TraceSet], Overflow, Report]:
    """Return the sets of one row, what an overflow policy took away, and what is to be reported.

    Raises:
        ValueError: if there are more traces than forking tokens, and the policy is ``"error"``.
    """
    traces = render_traces(
        record,
        tokenizer,
        options.tokens,
        options.rows,
        features=features,
        verify=options.rows.verifies(index),
    )
    num_tokens = len(options.tokens.ids)
    if len(traces) > num_tokens and options.excess_traces == "error":
        raise ValueError(
            f"it has {len(traces)} completions, but there are only {num_tokens} forking tokens: "
            f"raise num_forking_tokens to at least {len(traces)}, remove completions, or set "
            'excess_traces="split" to match them in groups'
        )
    distinct = {(t.pass_.token_ids.tobytes(), t.pass_.trained.tobytes()) for t in traces}
    report = Report(len(traces) - len(distinct), int(len(traces) > num_tokens))
    kept, lost = _limit(traces, options.rows)
    groups: dict[int, list[Trace]] = {}
    for trace in kept:
        groups.setdefault(trace.number // num_tokens, []).append(trace)
    return [TraceSet(tuple(group), index) for group in groups.values()], lost, report


def _limit(traces: list[Trace], options: PreparationOptions) -> tuple[list[Trace], Overflow]:
    """Apply the overflow policy to each trace."""
    total = Overflow(longest=max(len(trace.pass_) for trace in traces))
    if options.max_length is None:
        return traces, total
    kept = []
    for trace in traces:
        try:
            passes, lost = limit_passes([trace.pass_], options.max_length, options.overflow)
        except PassTooLongError:
            raise ValueError(
                f"completion {trace.number} has {len(trace.pass_)} tokens with its prompt, but "
                f"max_length is {options.max_length}; raise max_length to at least "
                f'{total.longest}, or choose overflow="truncate" or overflow="drop"'
            ) from None
        kept += [Trace(pass_, trace.fork, trace.number) for pass_ in passes]
        total.add(lost)
    return kept, total


def _render_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    options: SetOptions,
    name: str,
    warn: bool,
    features: Features | None,
) -> dict[str, list[Any]]:
    register_families(options.rows)
    output: dict[str, list[Any]] = {column: [] for column in _RENDERED_FEATURES}
    for position, index in enumerate(indices):
        record = {column: values[position] for column, values in batch.items()}
        try:
            sets, lost, report = make_sets(record, index, tokenizer, options, features)
        except ValueError as error:
            raise ValueError(f"row {index} of the {name} dataset: {error}") from error
        counts = asdict(lost) | asdict(report)
        if warn:
            _warn(counts, options.rows, f"row {index} of the {name} dataset")
        # A row of which nothing is left stays, empty, until what it lost is counted.
        for columns in [to_row([set_]) for set_ in sets] or [to_row([])]:
            for column, value in (columns | counts).items():
                output[column].append(value)
            counts = dict.fromkeys(counts, 0)
    return output


def _pack_batch(batch: dict[str, list[Any]], max_length: int, code: str) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    sets = [from_row(row) for row in rows]
    # A set that is longer than a row by itself has one of its own, see `SetSFTTrainer`.
    lengths = [min(sum(map(_row_length, group)), max_length) for group in sets]
    packed = [
        to_row([set_ for number in numbers for set_ in sets[number]])
        for numbers in pack(lengths, max_length)
    ]
    return {name: [row[name] for row in packed] for name in SET_COLUMNS}


def _row_length(set_: TraceSet) -> int:
    """Return the row tokens of a matched set: the same whichever tokens its traces get."""
    passes: list[Pass] = [trace.behind(number) for number, trace in enumerate(set_.traces)]
    return build_tree(passes).num_row_tokens()


def _warn(counts: Mapping[str, int], options: PreparationOptions, what: str) -> None:
    """Log what was lost and what is odd; nothing is left out without a word."""
    if counts["num_passes"]:
        logger.warning(
            "%s: %d traces are longer than max_length=%s (the longest with its prompt: %d tokens); "
            "overflow=%r lost %d trained tokens, %d traces whole. Raise max_length to %d to keep "
            "them all",
            what,
            counts["num_passes"],
            options.max_length,
            counts["longest"],
            options.overflow,
            counts["num_lost_tokens"],
            counts["num_lost_turns"],
            counts["longest"],
        )
    if counts["num_split"]:
        logger.warning(
            "%s: %d questions have more traces than there are forking tokens; their traces are "
            "matched in groups",
            what,
            counts["num_split"],
        )
    if counts["num_repeated"]:
        logger.warning(
            "%s: %d traces repeat another one of their question; each is trained behind a token of "
            "its own, which then learns the same. Remove them if that isn't meant",
            what,
            counts["num_repeated"],
        )
