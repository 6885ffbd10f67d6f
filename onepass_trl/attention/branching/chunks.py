"""Segments cut into chunks of equal size, which recurrences compute as one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onepass_trl.attention.branching.segments import Ints, Segments, segments_of, upload
from onepass_trl.attention.remembered import once_per_batch


class Step(NamedTuple):
    """Chunks which have as many chunks before them in their passes."""

    own: slice
    """Of all chunks, these."""
    followed: slice
    """Of all chunks, those of these that have chunks after them: the first ones."""
    before: Tensor | None
    """``(chunks,)`` int64, the chunk before each, counted from the beginning of the step before;
    None if these are its followed chunks in their order, and at the first step."""

    def hand_on(self, ends: Tensor, starts: Tensor) -> None:
        """Write into `starts` of these chunks, ``(chunks, ..)``, the `ends` of those before."""
        if self.before is None:
            starts.copy_(ends)
        else:
            torch.index_select(ends, 0, self.before, out=starts)

    def hand_back(self, starts: Tensor, ends: Tensor) -> None:
        """Write into `ends` of the chunks before the sums of the `starts` that follow them."""
        if self.before is None:
            ends.copy_(starts)
        else:
            ends.zero_().index_add_(0, self.before, starts)


@dataclass(frozen=True, eq=False)
class Chunks:
    """A batch of rows as chunks of at most `size` tokens of a segment, step by step.

    Within a step, chunks from which longer passes go on come first. So the chunks of a step are
    those after the followed chunks of the step before, in the same order, unless the tree branches.

    Attributes:
        shape: batch and seq of the rows.
        tokens: ``(chunks, size)`` int64, counted over the whole batch; padding at the end of a
            chunk repeats its last token.
        is_padding: ``(chunks, size)`` bool.
        places: ``(batch * seq,)`` int64, where each token lies in the flattened chunks.
        steps: the chunks in the order in which their states become known.
    """

    shape: torch.Size
    tokens: Tensor
    is_padding: Tensor
    places: Tensor
    steps: list[Step]

    def handovers(self) -> list[tuple[Step, Step]]:
        """Return all pairs of a step and the one after it."""
        return list(zip(self.steps, self.steps[1:], strict=False))

    def cut(self, x: Tensor) -> Tensor:
        """Return ``(batch, seq, ..)`` as chunks, ``(chunks, size, ..)``.

        Padding must have no influence on what is made of them: it gets no gradient.
        """
        chunks: Tensor = _Cut.apply(x, self)
        return chunks

    def join(self, chunks: Tensor) -> Tensor:
        """Return ``(chunks, size, ..)`` as rows, ``(batch, seq, ..)``."""
        x: Tensor = _Join.apply(chunks, self)
        return x


class _Cut(torch.autograd.Function):
    """Its gradient gathers too: adding to rows by index is slow, and in any order on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunks: Chunks) -> Tensor:
        ctx.chunks = chunks
        return _cut(x, chunks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _join(gradients[0], ctx.chunks), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunked: Tensor, chunks: Chunks) -> Tensor:
        ctx.chunks = chunks
        return _join(chunked, chunks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        chunked = _cut(gradients[0], ctx.chunks)
        padding = ctx.chunks.is_padding.view(*chunked.shape[:2], *[1] * (chunked.ndim - 2))
        return chunked.masked_fill(padding, 0), None


def _cut(x: Tensor, chunks: Chunks) -> Tensor:
    tokens = chunks.tokens
    return x.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape)


def _join(chunked: Tensor, chunks: Chunks) -> Tensor:
    return chunked.flatten(0, 1).index_select(0, chunks.places).unflatten(0, chunks.shape)


def cut_into_chunks(segments: Segments, size: int, device: torch.device) -> Chunks:
    """Return the chunks of a batch, of `size` tokens, on a device.

    >>> import torch
    >>> from onepass_trl.attention.branching.segments import cut_into_segments
    >>> ends = np.array([[9, 9, 9, 5, 5, 9, 9, 9, 9]])
    >>> chunks = cut_into_chunks(cut_into_segments(ends), 2, torch.device("cpu"))
    >>> chunks.tokens.tolist()
    [[0, 1], [2, 2], [5, 6], [3, 4], [7, 8]]
    >>> [step.before if step.before is None else step.before.tolist() for step in chunks.steps]
    [None, None, [0, 0], None]
    """
    counts = -(-segments.lengths // size)  # chunks of each segment
    first_depth, height, path = _places_in_passes(segments.parents, counts)
    segment = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    depth = first_depth[segment] + within
    remaining = (counts + height)[segment] - within - 1  # chunks on the longest way from here
    order = np.lexsort((path[segment], -remaining, depth))
    place_of = np.argsort(order)

    begins = (segments.begins[segment] + within * size)[order]
    lengths = np.minimum(segments.lengths[segment] - within * size, size)[order]
    inside = np.minimum(np.arange(size), lengths[:, None] - 1)
    tokens = begins[:, None] + inside
    is_padding = np.arange(size) >= lengths[:, None]
    places = np.empty(int(segments.lengths.sum()), np.int64)
    places[tokens[~is_padding]] = np.flatnonzero(~is_padding)

    last_of_segment = np.cumsum(counts) - 1
    parent = segments.parents[segment]
    before = np.where(within > 0, np.arange(len(segment)) - 1, last_of_segment[parent])
    before = place_of[before][order]  # of the first step's without meaning

    sizes = np.bincount(depth)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    followed = np.bincount(depth, weights=remaining > 0).astype(np.int64)
    befores: list[Ints | None] = [None]
    for at in range(1, len(sizes)):
        chosen = before[bounds[at] : bounds[at + 1]] - bounds[at - 1]
        befores.append(None if np.array_equal(chosen, np.arange(followed[at - 1])) else chosen)

    arrays = [tokens.ravel(), places, *(x for x in befores if x is not None)]
    on_device = iter(upload(arrays, device))
    tokens_on_device, places_on_device = next(on_device), next(on_device)
    steps = [
        Step(
            slice(begin, end),
            slice(begin, begin + num),
            None if chosen is None else next(on_device),
        )
        for begin, end, num, chosen in zip(
            bounds[:-1].tolist(), bounds[1:].tolist(), followed.tolist(), befores, strict=True
        )
    ]
    return Chunks(
        torch.Size((len(places) // segments.seq, segments.seq)),
        tokens_on_device.view(-1, size),
        torch.from_numpy(is_padding).to(device),
        places_on_device,
        steps,
    )


def _places_in_passes(parents: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Return of each segment the chunks before it, those after it on the longest way from it, and
    the segment in which this way ends."""
    before = np.zeros_like(counts)
    after = np.zeros_like(counts)
    path = np.arange(len(counts))
    for segment, parent in enumerate(parents.tolist()):  # parents come first
        if parent >= 0:
            before[segment] = before[parent] + counts[parent]
    for segment in range(len(parents) - 1, -1, -1):
        parent = parents[segment]
        if parent >= 0 and (length := counts[segment] + after[segment]) > after[parent]:
            after[parent], path[parent] = length, path[segment]
    return before, after, path


@once_per_batch
def chunks_of(visible_end: Tensor, size: int) -> Chunks:
    """Return the chunks of ``(batch, seq)`` rows.

    They have fewer than `size` tokens, a power of two, if all segments are much shorter.
    """
    segments = segments_of(visible_end)
    longest = 1 << (int(segments.lengths.max()) - 1).bit_length()
    return cut_into_chunks(segments, min(size, longest), visible_end.device)
