"""Rows of a prepared dataset to batches of trace sets, which are laid out once they are matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.setsft.traces import from_row


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
