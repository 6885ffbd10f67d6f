"""Traces: passes in which one place is left for a forking token; and rows of sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.passes import Pass

SET_COLUMNS = (
    "input_ids",
    "trained",
    "trace_lengths",
    "forks",
    "trace_numbers",
    "set_sizes",
    "set_indices",
)
"""Columns of a prepared row, which holds one set, or several where sets are packed.

- ``input_ids`` (int32) and ``trained`` (bool): the tokens of all traces, one after another
- ``trace_lengths``, ``forks``, ``trace_numbers``: int32, one value for each trace
- ``set_sizes`` (traces) and ``set_indices``: int32, one value for each set
"""


@dataclass(frozen=True, eq=False)
class Trace:
    """One solution of a question: the question, a forking token, the reasoning and the answer.

    Attributes:
        pass_: the tokens, and which of them are trained. The token at `fork` is replaced.
        fork: index of the forking token. It is given, not learned, so it isn't trained.
        number: the trace's number among the completions of its record.
    """

    pass_: Pass
    fork: int
    number: int

    def after(self, token_id: int, num_targets: int | None = None) -> Pass:
        """Return the pass of this trace after a forking token.

        Args:
            token_id: the forking token.
            num_targets: keep only the first `num_targets` trained tokens; None keeps all.

        >>> Trace(Pass([5, 0, 6, 7], [0, 0, 1, 1]), fork=1, number=0).after(9, 1).token_ids
        array([5, 9, 6], dtype=int32)
        """
        ids, trained = self.pass_.token_ids.copy(), self.pass_.trained
        ids[self.fork] = token_id
        if num_targets is not None and num_targets < self.pass_.num_trained:
            end = int(np.flatnonzero(trained)[num_targets - 1]) + 1
            ids, trained = ids[:end], trained[:end]
        return Pass(ids, trained)


@dataclass(frozen=True, eq=False)
class TraceSet:
    """The traces of one question that are matched with one another.

    Attributes:
        traces: at least one, at most as many as there are forking tokens.
        index: the number of its record in the dataset, which seeds what is drawn for it.
    """

    traces: tuple[Trace, ...]
    index: int

    def num_row_tokens(self) -> int:
        """Return how many tokens the traces have as one row, each after a different token.

        >>> traces = [Trace(Pass([5, 0, *ids], [0, 0, *ids]), 1, 0) for ids in ([6, 7], [6])]
        >>> TraceSet(tuple(traces), 0).num_row_tokens()
        6
        """
        question = max(trace.fork for trace in self.traces)
        return question + sum(len(trace.pass_) - trace.fork for trace in self.traces)

    def after(self, token_ids: Sequence[int]) -> list[Pass]:
        """Return the pass of each trace after its own forking token."""
        return [trace.after(token) for trace, token in zip(self.traces, token_ids, strict=True)]


def to_row(sets: Sequence[TraceSet]) -> dict[str, Any]:
    """Return the sets as the columns of a row."""
    traces = [trace for set_ in sets for trace in set_.traces]
    ids = [np.empty(0, dtype=np.int32), *(trace.pass_.token_ids for trace in traces)]
    trained = [np.empty(0, dtype=np.bool_), *(trace.pass_.trained for trace in traces)]
    return {
        "input_ids": np.concatenate(ids),
        "trained": np.concatenate(trained),
        "trace_lengths": [len(trace.pass_) for trace in traces],
        "forks": [trace.fork for trace in traces],
        "trace_numbers": [trace.number for trace in traces],
        "set_sizes": [len(set_.traces) for set_ in sets],
        "set_indices": [set_.index for set_ in sets],
    }


def from_row(row: Mapping[str, Any]) -> list[TraceSet]:
    """Return the sets of a row.

    Raises:
        ValueError: if columns are missing, or don't belong together.
    """
    missing = [name for name in SET_COLUMNS if name not in row]
    if missing:
        raise ValueError(
            f"a row of sets lacks the columns {', '.join(missing)}; got: {', '.join(row)}. Let "
            "SetSFTTrainer prepare the dataset"
        )
    columns = {name: np.asarray(row[name]) for name in SET_COLUMNS}
    _check_columns(columns)
    ends = np.cumsum(columns["trace_lengths"])
    ids = np.split(columns["input_ids"], ends[:-1])
    trained = np.split(columns["trained"], ends[:-1])
    traces = [
        Trace(Pass(pass_ids, flags), int(fork), int(number))
        for pass_ids, flags, fork, number in zip(
            ids, trained, columns["forks"], columns["trace_numbers"], strict=True
        )
    ]
    ends = np.cumsum(columns["set_sizes"])
    return [
        TraceSet(tuple(traces[end - size : end]), int(index))
        for end, size, index in zip(ends, columns["set_sizes"], columns["set_indices"], strict=True)
    ]


def _check_columns(columns: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError unless the columns of a row belong together."""
    for name, values in columns.items():
        if values.ndim != 1 or values.dtype.kind not in ("bi" if name == "trained" else "iu"):
            raise ValueError(
                f"{name} is {values.dtype} of shape {values.shape}, expected a list of "
                f"{'booleans' if name == 'trained' else 'whole numbers'}"
            )
    for counts, counted, what in (
        ("trace_lengths", ("input_ids", "trained"), "one for each token of the traces"),
        ("set_sizes", ("trace_lengths", "forks", "trace_numbers"), "one for each trace"),
    ):
        number = int(columns[counts].sum())
        if not columns[counts].size or columns[counts].min() < 1:
            raise ValueError(f"{counts} is {columns[counts].tolist()}, expected positive numbers")
        for name in counted:
            if columns[name].size != number:
                raise ValueError(
                    f"{name} has {columns[name].size} values, expected {what}: {number}, the sum "
                    f"of {counts}"
                )
    if columns["set_indices"].size != columns["set_sizes"].size:
        raise ValueError(
            f"set_indices has {columns['set_indices'].size} values, expected one for each set: "
            f"{columns['set_sizes'].size}"
        )
    forks, lengths = columns["forks"], columns["trace_lengths"]
    outside = (forks < 0) | (forks >= lengths)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(
            f"forks[{at}] is {forks[at]}, expected the index of the forking token in its trace, "
            f"from 0 to {lengths[at] - 1}"
        )
    is_trained = columns["trained"][np.cumsum(lengths) - lengths + forks].astype(bool)
    if is_trained.any():
        at = int(is_trained.argmax())
        raise ValueError(
            f"trace {at} trains the forking token at forks[{at}] = {forks[at]}: it is given, not "
            "learned"
        )
