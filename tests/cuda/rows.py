"""Rows of which one half of 128 queries sees tiles that the other half doesn't."""

from __future__ import annotations

import torch
from torch import Tensor


def row_of(seq: int, *subtrees: tuple[int, int]) -> Tensor:
    """Return the row of a trunk and of the subtrees [begin, end) that branch off it, or off those
    around them.
    """
    ends = torch.full((1, seq), seq, dtype=torch.int32)
    for begin, end in subtrees:
        ends[0, begin:end] = end
    return ends


# With the window. The queries are those from 384 on, in the last row those from 640 on.
HALF_SEEN: dict[str, tuple[Tensor, int | None]] = {
    "the second half sees the last tile alone": (row_of(512, (0, 430)), None),
    "the second half sees the first and the last tile": (row_of(512, (100, 430)), None),
    "there is no second half": (row_of(440), None),
    "the halves see the last tile, and none of the others both": (row_of(768, (330, 704)), 250),
}
