"""Gated and Kimi delta rules along the chunks of a tree, in PyTorch.

What transformers computes with its functions ``torch_chunk_gated_delta_rule`` and
``chunk_kimi_delta_attention`` (the chunked form of Gated DeltaNet, arXiv 2412.06464, and of Kimi
Linear, arXiv 2510.26692), in float32 as there. All that a chunk needs of its own tokens is computed
for all chunks of all segments at once; only the states go step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onepass_trl.attention.branching.chunks import Chunks, chunks_of

CHUNK_SIZE = 64
"""In tokens, as in transformers."""


def along_chunks(
    visible_end: Tensor,
    sequences: Sequence[Tensor],
    *,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> Tensor:
    """Return what a delta rule gives along the passes of a tree, ``(batch, seq, heads, d_v)``.

    Args:
        visible_end: ``(batch, seq)``.
        sequences: queries and keys, ``(batch, seq, key_heads, d_k)``, of which several consecutive
            heads of values may share one; values, ``(batch, seq, heads, d_v)``; the logarithms of
            the decay, ``(batch, seq, heads)``, in Kimi delta attention ``(batch, seq, heads,
            d_k)``; and the rates of the updates, ``(batch, seq, heads)``.
        use_qk_l2norm_in_kernel: whether queries and keys are divided by their norms.
    """
    chunks = chunks_of(visible_end, CHUNK_SIZE)
    with torch.autocast(sequences[0].device.type, enabled=False):
        return _delta_rule(sequences, chunks, normalize=use_qk_l2norm_in_kernel)


def _delta_rule(sequences: Sequence[Tensor], chunks: Chunks, *, normalize: bool) -> Tensor:
    dtype, key_heads = sequences[0].dtype, sequences[1].shape[2]
    channelwise = sequences[3].ndim == 4
    # (chunks, key heads, heads of values for each, size, ..)
    q, k, v, log, rate = (
        chunks.cut(x if x.ndim == 4 else x[..., None])
        .transpose(1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
        .unflatten(1, (key_heads, -1))
        for x in sequences
    )
    padding = chunks.is_padding[:, None, None, :, None]
    log, rate = log.masked_fill(padding, 0).cumsum(-2), rate.masked_fill(padding, 0)
    if normalize:
        q, k = _normalized(q), _normalized(k)
    q = q * q.shape[-1] ** -0.5
    keys_keys, queries_keys = (_channelwise_products if channelwise else _products)(k, q, log)
    decay = log.exp()  # since the beginning of the chunk
    # The updates of a chunk depend on one another: (1 + system) @ updates is what each would be.
    system = keys_keys * rate
    values = _solve(system, v * rate)
    reads = _solve(system, k * (rate * decay))
    keys = k * (log[..., -1:, :] - log).exp()
    by_head = (x.flatten(1, 2) for x in (values, reads, keys, decay[..., -1, :, None]))
    starts, updates = _States.apply(*by_head, chunks)
    out = queries_keys.flatten(1, 2) @ updates + (q * decay).flatten(1, 2) @ starts
    return chunks.join(out.transpose(1, 2).to(dtype))


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _solve(system: Tensor, of: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(system, of, upper=False, unitriangular=True)


def _products(k: Tensor, q: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys times keys and queries times keys, decayed: ``(.., size, size)`` each.

    Args:
        k: ``(.., size, d_k)``.
        q: ``(.., size, d_k)``.
        log: ``(.., size, 1)``, the logarithm of the decay since the beginning of the chunk.
    """
    size = k.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    decay = (log - log.mT).masked_fill(later, -torch.inf).exp()
    return k @ k.mT * decay, q @ k.mT * decay


def _channelwise_products(k: Tensor, q: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same where each channel has its own decay: `log` is ``(.., size, d_k)``.

    The decay from j to i is that from j to a token between them times that from there to i, and
    both are at most 1. So blocks of the matrix are products of matrices: for each power of two,
    those that combine two blocks of the diagonal into one of twice the size.
    """
    # (.., blocks, keys and queries, rows, columns)
    blocks = torch.stack([(k * k).sum(-1), (q * k).sum(-1)], dim=-1)[..., None, None]
    while (size := blocks.shape[-1]) < k.shape[-2]:
        halves = (-1, 2, size)
        (k_first, k_second), q_second, (first, second) = (
            k.unflatten(-2, halves).unbind(-3),
            q.unflatten(-2, halves).select(-3, 1),
            log.unflatten(-2, halves).unbind(-3),
        )
        between = first[..., -1:, :]
        later = (second - between).exp()
        rows = torch.cat([k_second * later, q_second * later], dim=-2)
        across = (rows @ (k_first * (between - first).exp()).mT).unflatten(-2, (2, size))
        upper, lower = blocks.unflatten(-4, (-1, 2)).unbind(-4)
        blocks = torch.cat([F.pad(upper, (0, size)), torch.cat([across, lower], -1)], -2)
    keys_keys, queries_keys = blocks.squeeze(-4).unbind(-3)
    return keys_keys, queries_keys


class _States(torch.autograd.Function):
    """The states in which chunks begin, and the updates that each token makes to the state.

    The state after a chunk is ``decay * start + keys.T @ updates``, and its updates are ``values -
    reads @ start``. For the backward only states in which chunks begin are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, reads: Tensor, keys: Tensor, decay: Tensor, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        """Return ``(chunks, heads, d_k, d_v)`` and ``(chunks, heads, size, d_v)``.

        Args:
            values: ``(chunks, heads, size, d_v)``.
            reads: ``(chunks, heads, size, d_k)``.
            keys: ``(chunks, heads, size, d_k)``.
            decay: ``(chunks, heads, d_k or 1, 1)``.
        """
        starts = values.new_zeros(*values.shape[:2], keys.shape[-1], values.shape[-1])
        updates = values.clone(memory_format=torch.contiguous_format)
        for step, following in [*chunks.handovers(), (chunks.steps[-1], None)]:
            own, followed = step.own, step.followed
            _add_product(updates[own], reads[own], starts[own], alpha=-1)
            if following is not None:
                ends = starts[followed] * decay[followed]
                _add_product(ends, keys[followed].mT, updates[followed])
                following.hand_on(ends, starts[following.own])
        ctx.save_for_backward(reads, keys, decay, starts, updates)
        ctx.chunks = chunks
        return starts, updates

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        reads, keys, decay, starts, updates = ctx.saved_tensors
        d_starts, d_updates = (x.clone(memory_format=torch.contiguous_format) for x in gradients)
        d_reads = torch.empty_like(reads, memory_format=torch.contiguous_format)
        d_keys, d_decay = torch.zeros_like(keys), torch.zeros_like(decay)
        for step, following in [(ctx.chunks.steps[-1], None), *reversed(ctx.chunks.handovers())]:
            own, followed = step.own, step.followed
            if following is not None:
                d_ends = torch.empty_like(starts[followed])
                following.hand_back(d_starts[following.own], d_ends)
                _add_product(d_updates[followed], keys[followed], d_ends)
                d_keys[followed] = updates[followed] @ d_ends.mT
                d_decay[followed] = (starts[followed] * d_ends).sum_to_size(decay[followed].shape)
                d_starts[followed].addcmul_(d_ends, decay[followed])
            torch.matmul(d_updates[own], starts[own].mT, out=d_reads[own]).neg_()
            _add_product(d_starts[own], reads[own].mT, d_updates[own], alpha=-1)
        return d_updates, d_reads, d_keys, d_decay, None


def _add_product(to: Tensor, a: Tensor, b: Tensor, *, alpha: int = 1) -> None:
    """Add ``alpha * a @ b`` to a contiguous tensor, for each chunk and head."""
    to.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=alpha)
