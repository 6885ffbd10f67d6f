"""Questions with several completions to rows of trace sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.compute as compute
from datasets import Features, List, Value

from onepass_trl.data import Overflow, build_tree, limit_passes
from onepass_trl.passes import Pass
from onepass_trl.preparation.datasets import Maker
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.report import Report
from onepass_trl.setsft.rendering import ForkingTokens, render_traces
from onepass_trl.setsft.traces import SET_COLUMNS, Trace, TraceSet, from_row, to_row
from onepass_trl.wording import counted

EXCESS_POLICIES = ("error", "split")

SET_FEATURES = {
    **{name: List(Value("int32")) for name in SET_COLUMNS},
    "trained": List(Value("bool")),
}


@dataclass
class SetReport(Report):
    """What was lost of questions, and what is odd about them.

    Attributes:
        num_repeated: traces that are equal to an earlier one of their question; they are kept.
        num_split: questions whose traces were split into several sets.
    """

    turn = "trace"
    context = "prompt"

    num_repeated: int = 0
    num_split: int = 0

    def add(self, other: SetReport) -> None:
        """Add what is to be said of other questions."""
        super().add(other)
        self.num_repeated += other.num_repeated
        self.num_split += other.num_split

    def lines(self, options: PreparationOptions) -> Iterator[str]:
        """Yield in words what was lost and what is odd."""
        yield from super().lines(options)
        if self.num_split:
            yield (
                f"{counted(self.num_split, 'question has', 'questions have')} more traces than "
                "there are forking tokens; they are matched in groups"
            )
        if self.num_repeated:
            yield (
                f"{counted(self.num_repeated, 'trace repeats', 'traces repeat')} another one of "
                "the same question; each is trained after a token of its own, which then learns "
                "the same. Remove what is repeated if that isn't intended"
            )

    def nothing_left(self, name: str) -> str:
        """Return in words that everything was lost of the dataset of this name."""
        return f"the {name} dataset has no trace left to train"


@dataclass(frozen=True)
class SetMaker(Maker):
    """Makes the rows of questions: sets of traces, in `SET_COLUMNS`.

    Attributes:
        tokens: the forking tokens.
        excess_traces: see `SetSFTConfig`.
    """

    features = SET_FEATURES
    written_features = SET_FEATURES
    report = SetReport

    tokens: ForkingTokens
    excess_traces: str

    def make(
        self, record: Mapping[str, Any], index: int, features: Features | None
    ) -> tuple[list[Mapping[str, Any]], SetReport]:
        """Return a row for each set of a question, and what is to be said of them."""
        traces = render_traces(
            record,
            self.processing_class,
            self.tokens,
            self.options,
            features=features,
            verify=self.options.verifies(index),
        )
        num_tokens = len(self.tokens.ids)
        if len(traces) > num_tokens and self.excess_traces == "error":
            raise ValueError(
                f"it has {len(traces)} completions for "
                f"{counted(num_tokens, 'forking token')}: raise num_forking_tokens to at least "
                f"{len(traces)}, remove completions, or set "
                'excess_traces="split" to match them in groups'
            )
        distinct = {(t.pass_.token_ids.tobytes(), t.pass_.trained.tobytes()) for t in traces}
        kept, lost = _limit(traces, self.options)
        groups: dict[int, list[Trace]] = {}
        for trace in kept:
            groups.setdefault(trace.number // num_tokens, []).append(trace)
        report = SetReport(
            overflow=lost,
            num_repeated=len(traces) - len(distinct),
            num_split=int(len(traces) > num_tokens),
        )
        return [to_row([TraceSet(tuple(group), index)]) for group in groups.values()], report

    def length(self, row: Mapping[str, Any]) -> int:
        """Return the tokens of a row once its sets are matched, whichever tokens traces get.

        A set that is longer than a row by itself has one of its own, see `SetSFTTrainer`.
        """
        length = sum(map(_row_length, from_row(row)))
        return length if self.options.max_length is None else min(length, self.options.max_length)

    def join(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return one row that holds the sets of several."""
        return to_row([set_ for row in rows for set_ in from_row(row)])

    @staticmethod
    def check_rows(rows: pyarrow.Table, name: Callable[[int], str]) -> None:
        """Raise ValueError unless the rows are those of sets of traces."""
        for number, row in enumerate(rows.to_pylist()):
            try:
                from_row(row)
            except ValueError as error:
                raise ValueError(f"{name(number)}: {error}") from error

    def check_prepared(self, rows: pyarrow.Table, name: str) -> None:
        """Raise ValueError for traces that are too long, and for sets of too many."""
        for column, limit, what, option in (
            ("trace_lengths", self.options.max_length, "tokens in a trace", "max_length"),
            ("set_sizes", len(self.tokens.ids), "traces in a set", "num_forking_tokens"),
        ):
            largest = compute.max(compute.list_flatten(rows[column])).as_py() or 0
            if limit is not None and largest > limit:
                raise ValueError(
                    f"the prepared {name} dataset has {largest} {what}, but {option} is {limit}: "
                    f"raise it, or prepare the questions with this {option}"
                )


def _limit(traces: list[Trace], options: PreparationOptions) -> tuple[list[Trace], Overflow]:
    """Apply the overflow policy to each trace."""
    total = Overflow(longest=max(len(trace.pass_) for trace in traces))
    if options.max_length is None:
        return traces, total
    kept = []
    for trace in traces:
        if options.overflow == "error" and len(trace.pass_) > options.max_length:
            raise ValueError(
                f"completion {trace.number} has {len(trace.pass_)} tokens with its prompt, but "
                f"max_length is {options.max_length}; raise max_length to at least "
                f'{total.longest}, or choose overflow="truncate" or overflow="drop"'
            )
        passes, lost = limit_passes([trace.pass_], options.max_length, options.overflow)
        kept += [Trace(pass_, trace.fork, trace.number) for pass_ in passes]
        total.add(lost)
    return kept, total


def _row_length(set_: TraceSet) -> int:
    passes: list[Pass] = [trace.after(number) for number, trace in enumerate(set_.traces)]
    return build_tree(passes).num_row_tokens()
