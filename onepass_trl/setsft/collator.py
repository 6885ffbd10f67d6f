"""Rows of a prepared dataset to sets of traces. Their tokens are laid out once they are matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onepass_trl.passes import IGNORE_INDEX, Pass
from onepass_trl.setsft.traces import Trace, TraceSet

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
        ValueError: if columns are missing.
    """
    missing = [name for name in SET_COLUMNS if name not in row]
    if missing:
        raise ValueError(
            f"a row of sets lacks the columns {', '.join(missing)}; got: {', '.join(row)}. Let "
            "SetSFTTrainer prepare the dataset"
        )
    columns = {name: np.asarray(row[name]) for name in SET_COLUMNS}
    ends = np.cumsum(columns["trace_lengths"])
    ids = np.split(columns["input_ids"], ends[:-1])
    trained = np.split(columns["trained"], ends[:-1])
    traces = [
        Trace(Pass(*pass_), int(fork), int(number))
        for *pass_, fork, number in zip(
            ids, trained, columns["forks"], columns["trace_numbers"], strict=True
        )
    ]
    ends = np.cumsum(columns["set_sizes"])
    return [
        TraceSet(tuple(traces[end - size : end]), int(index))
        for end, size, index in zip(ends, columns["set_sizes"], columns["set_indices"], strict=True)
    ]


class SetCollator:
    """Collates rows of sets into one batch.

    Returns a dict of

    - ``sets``: the list of their `TraceSet`, which are matched before they are laid out
    - ``num_sets``: the list of how many of them each row has
    - ``input_ids`` ``(1, num_tokens)`` int64: the traces one after another
    - ``shift_labels`` ``(1, num_tokens)`` int64 and ``weights`` ``(1, num_tokens)`` float32: what
      is trained of them, to be counted
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of `rows`."""
        of_rows = [from_row(row) for row in rows]
        sets = [set_ for of_row in of_rows for set_ in of_row]
        passes = [trace.pass_ for set_ in sets for trace in set_.traces]
        ids = np.concatenate([pass_.token_ids for pass_ in passes]).astype(np.int64)
        trained = np.concatenate([pass_.trained for pass_ in passes])
        return {
            "sets": sets,
            "num_sets": [len(of_row) for of_row in of_rows],
            "input_ids": torch.from_numpy(ids)[None],
            "shift_labels": torch.from_numpy(np.where(trained, ids, IGNORE_INDEX))[None],
            "weights": torch.from_numpy(trained.astype(np.float32))[None],
        }
