"""The scan of Mamba 2 along the passes of a tree: one call of the model's own for all chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onepass_trl.attention.branching.chunks import Chunks, chunks_of
from onepass_trl.attention.branching.packages import (
    MAMBA,
    is_of_transformers,
    refusal_on_cpu,
    warn_if_unused,
)
from onepass_trl.attention.head_exchange import ContextParallel

SIZE_IN_PYTORCH = 64
"""Most tokens of a chunk where a function in PyTorch makes matrices of size x size."""


def chunk_scan(scan: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `scan`, that of Mamba 2, made to follow `visible_end`."""
    # Older ones can't be imported with transformers 5.
    warn_if_unused(scan, MAMBA, "layers of Mamba 2", "mamba-ssm>=2.3")
    refuse_cpu = refusal_on_cpu(scan, name)

    @functools.wraps(scan)
    def branching(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        *,
        visible_end: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        refuse_cpu(hidden_states)
        if visible_end is None:
            state = dict(initial_states=initial_states, return_final_states=return_final_states)
            return scan(hidden_states, dt, A, B, C, chunk_size, **state, **kwargs)
        assert initial_states is None
        assert not return_final_states
        size = min(chunk_size, SIZE_IN_PYTORCH) if is_of_transformers(scan) else chunk_size
        sequences = (hidden_states, dt, B, C)
        options = dict(name=name, context_parallel=context_parallel, **kwargs)
        return _along_chunks(scan, visible_end, size, A, *sequences, **options)

    return branching


# What is made of a tree, and its number of steps, differ from batch to batch.
@torch.compiler.disable
def _along_chunks(
    scan: Callable[..., Any],
    visible_end: Tensor,
    size: int,
    A: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    name: str,
    context_parallel: ContextParallel | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> Tensor:
    """Return what a scan gives along the passes of a tree, ``(batch, seq, heads, head_dim)``.

    The chunks are rows of one batch. Their initial states follow from those of the chunks before,
    by the decay of these and what these add to a state of zero.

    Args:
        scan: takes initial states and gives the outputs, as that of mamba-ssm.
        visible_end: ``(batch, seq)``, of whole rows.
        A: ``(heads,)``.
        x: ``(batch, seq, heads, head_dim)``.
        dt: ``(batch, seq, heads)``.
        B: ``(batch, seq, groups, state_size)``.
        C: ``(batch, seq, groups, state_size)``.
        name: of the scan, for errors.
        context_parallel: if sequences and result are pieces of rows.
        D: ``(heads,)`` or ``(heads, head_dim)``.
        z: ``(batch, seq, heads, head_dim)``.
        dt_bias: ``(heads,)``.
    """
    sequences = [x, dt, B, C] if z is None else [x, dt, B, C, z]
    if context_parallel is not None:
        sequences = context_parallel.to_whole_rows(name, *sequences)
        A = context_parallel.own_share(A)
        D = None if D is None else context_parallel.own_share(D)
        dt_bias = None if dt_bias is None else context_parallel.own_share(dt_bias)
    chunks = chunks_of(visible_end, size)
    x, dt, B, C, *gate = map(chunks.cut, sequences)
    with torch.autocast(x.device.type, enabled=False):
        # Steps of float32, and of zero at padding, which so leaves no trace in a state.
        steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
        steps = steps.masked_fill(chunks.is_padding[..., None], 0)
        starts = _initial_states(x, steps, A.float(), B, chunks)
    kwargs |= dict(D=D, z=gate[0] if gate else None, initial_states=starts)
    out = chunks.join(scan(x, steps, A, B, C, chunks.tokens.shape[1], **kwargs))
    return out if context_parallel is None else context_parallel.to_own_piece(out)


def _initial_states(x: Tensor, steps: Tensor, A: Tensor, B: Tensor, chunks: Chunks) -> Tensor:
    """Return the states in which chunks begin, ``(chunks, heads, head_dim, state_size)``."""
    log = (steps * A).cumsum(1)  # of the decay since the beginning of the chunk
    added = x.float() * (steps * (log[:, -1:] - log).exp())[..., None]
    by_group = added.unflatten(2, (B.shape[2], -1)).flatten(3)  # (chunks, size, groups, ..)
    ends = by_group.permute(0, 2, 3, 1) @ B.float().transpose(1, 2)
    ends = ends.flatten(1, 2).unflatten(1, x.shape[2:])
    starts: Tensor = _States.apply(ends, log[:, -1].exp()[..., None, None], chunks)
    return starts


class _States(torch.autograd.Function):
    """The states in which chunks begin, if the state after each is ``decay * start + end``."""

    @staticmethod
    def forward(ctx: Any, ends: Tensor, decay: Tensor, chunks: Chunks) -> Tensor:
        """Return the states, as `ends`.

        Args:
            ends: ``(chunks, heads, head_dim, state_size)``.
            decay: ``(chunks, heads, 1, 1)``.
        """
        starts = torch.zeros_like(ends, memory_format=torch.contiguous_format)
        for step, following in chunks.handovers():
            own = step.followed
            after = torch.addcmul(ends[own], starts[own], decay[own])
            following.hand_on(after, starts[following.own])
        ctx.save_for_backward(decay, starts)
        ctx.chunks = chunks
        return starts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, starts = ctx.saved_tensors
        d_starts = gradients[0].clone(memory_format=torch.contiguous_format)
        d_ends = torch.zeros_like(starts)
        for step, following in reversed(ctx.chunks.handovers()):
            own = step.followed
            following.hand_back(d_starts[following.own], d_ends[own])
            d_starts[own].addcmul_(d_ends[own], decay[own])
        return d_ends, (d_ends * starts).sum_to_size(decay.shape), None


def fused_scan(convolve_and_scan: Callable[..., Any], _: str) -> Callable[..., Any]:
    """Return Mamba 2's convolution and scan in one, made to leave both to others on a tree."""

    @functools.wraps(convolve_and_scan)
    def branching(*args: Any, visible_end: Tensor | None = None, **kwargs: Any) -> Any:
        # None: the layer then calls the convolution and the scan apart.
        return convolve_and_scan(*args, **kwargs) if visible_end is None else None

    return branching
