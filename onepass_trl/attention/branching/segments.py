"""Trees as segments: runs of tokens that are each the only child of the one before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onepass_trl.attention.remembered import once_per_batch
from onepass_trl.visibility import check_visible_end

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Segments:
    """Where segments lie and which follows which; tokens are counted over the whole batch.

    A state is handed on only from the end of one segment to the beginning of others.

    Attributes:
        begins: ``(segments,)`` int64, the first token of each, ascending.
        lengths: ``(segments,)`` int64.
        parents: ``(segments,)`` int64, the segment before each in its passes, -1 for none.
        levels: ``(segments,)`` int64, how many segments come before each in its passes.
        token_parents: ``(batch * seq,)`` int64, the token before each in its passes, -1 for none.
        seq: tokens of a row.
    """

    begins: Ints
    lengths: Ints
    parents: Ints
    levels: Ints
    token_parents: Ints
    seq: int


def cut_into_segments(visible_end: NDArray[np.integer]) -> Segments:
    """Return the segments of ``(batch, seq)`` rows.

    Raises:
        VisibilityError: a row is not a tree.

    >>> segments = cut_into_segments(np.array([[9, 9, 9, 5, 5, 9, 9, 9, 9]]))
    >>> print(segments.begins, segments.lengths, segments.parents, segments.levels)
    [0 3 5] [3 2 4] [-1  0  0] [0 1 1]
    """
    rows = visible_end.astype(np.int64)
    for row in rows:
        check_visible_end(row.astype(np.int32))
    num_tokens, seq = rows.size, rows.shape[1]
    in_rows = np.stack([_token_parents(row) for row in rows])
    begins_of_rows = np.arange(len(rows))[:, None] * seq
    token_parents = np.where(in_rows >= 0, in_rows + begins_of_rows, -1).ravel()
    is_begin = token_parents != np.arange(num_tokens) - 1
    is_begin[:1] = True
    # Where a state is handed on to another token, the segment ends.
    branched = token_parents[is_begin & (token_parents >= 0)]
    is_begin[branched + 1] = True
    begins = np.flatnonzero(is_begin)
    segment_of = np.cumsum(is_begin) - 1
    before = token_parents[begins]
    parents = np.where(before >= 0, segment_of[before], -1)
    levels: list[int] = []
    for parent in parents.tolist():
        levels.append(0 if parent < 0 else levels[parent] + 1)
    lengths = np.diff(begins, append=num_tokens)
    return Segments(begins, lengths, parents, np.array(levels), token_parents, seq)


def _token_parents(ends: Ints) -> Ints:
    """Return the token before each token of a row in its passes, -1 for none."""
    tokens = np.arange(len(ends))
    parents = tokens - 1
    # Elsewhere the token before still sees it.
    for token in np.flatnonzero(ends[:-1] == tokens[1:]) + 1:
        parent = parents[token - 1]
        while parent >= 0 and ends[parent] <= token:
            parent = parents[parent]
        parents[token] = parent
    return parents


def upload(arrays: list[Ints], device: torch.device) -> list[Tensor]:
    """Return arrays as tensors on a device, sent there in one copy.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel again for a pointer that isn't.
    """
    padded = [np.pad(array, (0, len(array) % 2)) for array in arrays]
    sent = torch.from_numpy(np.concatenate(padded)).to(device).split([len(x) for x in padded])
    return [tensor[: len(array)] for tensor, array in zip(sent, arrays, strict=True)]


@once_per_batch
def segments_of(visible_end: Tensor) -> Segments:
    """Return the segments of ``(batch, seq)`` integers on any device."""
    return cut_into_segments(visible_end.cpu().numpy())
