"""Trees of segments as levels: in which order kernels that take many sequences at once go along.

A segment can run when the state in which its parent ends is known. Segments without children hand
nothing on, so they wait until all others are done and run together, as the last level: a
conversation takes a launch for each piece of its trunk and one for all of its branches.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onepass_trl.attention.branching.segments import Ints, Segments, segments_of, upload
from onepass_trl.attention.remembered import once_per_batch


class Level(NamedTuple):
    """Segments that run at once, ``n`` of them; they follow each other in `Levels`."""

    segments: slice
    """Which these are."""
    continuing: slice
    """Those of them that have a parent."""
    parents: Tensor | None
    """The parents of these, int64 places among all segments; None if there are none."""
    cu_seqlens: Tensor
    """``(n + 1,)`` int64: where the segments begin among all tokens, and where the last ends."""
    chunk_offsets: Tensor
    """``(n,)`` int64: where the chunks of each begin among those of all segments."""


class Levels:
    """The segments of a batch ordered by level, and its tokens in that order.

    Attributes:
        order: ``(batch * seq,)`` int64, the tokens of the segments one after another.
        place: ``(batch * seq,)`` int64, where each token lies in that order.
        cu_seqlens: ``(segments + 1,)`` int64, where the segments begin in that order.
        cu_seqlens_cpu: the same on the CPU.
        levels: parents come before their children.
        chunk_size: of how many tokens a chunk is, but for the last of a segment.
        num_segments: of all levels.
        num_chunks: into how many chunks the segments are cut, each by itself.
        num_steps: how many chunks follow one another: the longest segment of each level, summed.
    """

    def __init__(self, segments: Segments, chunk_size: int, device: torch.device) -> None:
        with_children = segments.parents[segments.parents >= 0]
        last = segments.levels[with_children].max(initial=-1) + 1
        levels = np.full_like(segments.levels, last)
        levels[with_children] = segments.levels[with_children]
        # Those that begin in no state come first, so that the others of a level are a slice.
        chosen = np.lexsort((segments.parents >= 0, levels))
        place_of = np.argsort(chosen)
        lengths, begins = segments.lengths[chosen], segments.begins[chosen]
        parents = segments.parents[chosen]
        parents = np.where(parents >= 0, place_of[parents], -1)
        cu_seqlens = _offsets(lengths)
        chunks = -(-lengths // chunk_size)
        chunk_offsets = _offsets(chunks)
        order = np.repeat(begins - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
        arrays = [order, np.argsort(order), cu_seqlens]
        ranges = []
        self.num_steps = 0
        bounds = np.searchsorted(levels[chosen], np.arange(last + 2)).tolist()
        for begin, end in itertools.pairwise(bounds):
            continuing = begin + int((parents[begin:end] < 0).sum())
            ranges.append((begin, continuing, end))
            arrays += [
                parents[continuing:end],
                cu_seqlens[begin : end + 1],
                chunk_offsets[begin:end],
            ]
            self.num_steps += int(chunks[begin:end].max())
        self.order, self.place, self.cu_seqlens, *of_levels = upload(arrays, device)
        self.cu_seqlens_cpu = torch.from_numpy(cu_seqlens)
        self.levels = [
            Level(
                segments=slice(begin, end),
                continuing=slice(continuing, end),
                parents=of_levels[3 * index] if continuing < end else None,
                cu_seqlens=of_levels[3 * index + 1],
                chunk_offsets=of_levels[3 * index + 2],
            )
            for index, (begin, continuing, end) in enumerate(ranges)
        ]
        self.chunk_size = chunk_size
        self.num_segments, self.num_chunks = len(lengths), int(chunk_offsets[-1])

    def ordered(self, tokens: Tensor) -> Tensor:
        """Return ``(batch * seq, ..)`` tokens in the order of the levels."""
        return _Reordered.apply(tokens, self.order, self.place)

    def in_rows(self, tokens: Tensor) -> Tensor:
        """Return ``(batch * seq, ..)`` tokens in the order of the levels as they lie in rows."""
        return _Reordered.apply(tokens, self.place, self.order)


class _Reordered(torch.autograd.Function):
    """Takes tokens by a permutation. So its gradient takes too, where that of indexing adds."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


def _offsets(lengths: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)])


@once_per_batch
def levels_of(visible_end: Tensor, chunk_size: int) -> Levels:
    """Return the levels of ``(batch, seq)`` integers on their device."""
    return Levels(segments_of(visible_end), chunk_size, visible_end.device)
