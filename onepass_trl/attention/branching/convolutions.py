"""Causal convolutions along the passes of a tree: along the row, and once more at its seams."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from onepass_trl.attention.branching.packages import CONVOLUTION, refusal_on_cpu, warn_if_unused
from onepass_trl.attention.branching.segments import Segments, segments_of
from onepass_trl.attention.head_exchange import ContextParallel
from onepass_trl.attention.remembered import once_per_batch


class Seams(NamedTuple):
    """Tokens whose predecessors are not those before them in the row."""

    tokens: Tensor
    """``(seams,)`` int64, counted over the whole batch."""
    predecessors: Tensor
    """``(seams, width)`` int64: the last `width` tokens of their passes, themselves the last of
    these; -1 before the first."""


def find_seams(segments: Segments, width: int, device: torch.device) -> Seams:
    """Return the seams of a causal convolution over `width` tokens."""
    parents = segments.token_parents
    tokens = np.arange(len(parents))
    chain = [tokens]
    is_seam = np.zeros(len(tokens), bool)
    for distance in range(1, width):
        last = chain[-1]
        chain.append(np.where(last >= 0, parents[last], -1))
        before = np.where(tokens % segments.seq >= distance, tokens - distance, -1)
        is_seam |= chain[-1] != before
    predecessors = np.stack(chain[::-1], axis=1)[is_seam]
    seams = (torch.from_numpy(x).to(device) for x in (tokens[is_seam], predecessors))
    return Seams(*seams)


@torch.compiler.disable  # they are found on the host
@once_per_batch
def _seams_of(visible_end: Tensor, width: int) -> Seams:
    return find_seams(segments_of(visible_end), width, visible_end.device)


def convolution(convolve: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Return `convolve`, a causal depthwise convolution, made to follow `visible_end`."""
    warn_if_unused(convolve, CONVOLUTION, "short convolutions", "causal-conv1d")
    refuse_cpu = refusal_on_cpu(convolve, name)

    @functools.wraps(convolve)
    def branching(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        visible_end: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        **kwargs: Any,
    ) -> Tensor:
        refuse_cpu(hidden_states)
        if visible_end is None:
            return convolve(hidden_states, weight, bias, activation=activation, **kwargs)
        if context_parallel is not None:  # as if channels were heads
            pieces = hidden_states.transpose(1, 2)
            (whole,) = context_parallel.to_whole_rows(name, pieces)
            hidden_states = whole.transpose(1, 2)
            weight = context_parallel.own_share(weight)
            bias = None if bias is None else context_parallel.own_share(bias)
        out = convolve(hidden_states, weight, bias, activation=None, **kwargs)
        rows = out.transpose(1, 2).flatten(0, 1)
        tokens = hidden_states.transpose(1, 2).flatten(0, 1)
        rows = _convolve_seams(rows, tokens, weight, bias, visible_end)
        rows = rows.unflatten(0, visible_end.shape)
        if context_parallel is not None:
            rows = context_parallel.to_own_piece(rows)
        out = rows.transpose(1, 2)
        return out if activation is None else ACT2FN[activation](out)

    return branching


def _convolve_seams(
    out: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, visible_end: Tensor
) -> Tensor:
    """Return `out` with the tokens at seams computed from their own predecessors.

    Args:
        out: ``(batch * seq, channels)``, convolved along the rows.
        tokens: ``(batch * seq, channels)``, what was convolved.
        weight: ``(channels, width)``.
        bias: ``(channels,)``.
        visible_end: ``(batch, seq)``.
    """
    width = weight.shape[-1]
    seams = _seams_of(visible_end, width)
    before = tokens[seams.predecessors.clamp(min=0)]  # (seams, width, channels)
    before = before.masked_fill((seams.predecessors < 0)[..., None], 0)
    at_seams = (before * weight.T).sum(1)
    if bias is not None:
        at_seams = at_seams + bias
    return out.index_copy(0, seams.tokens, at_seams.to(out.dtype))
