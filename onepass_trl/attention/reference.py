"""The dense reference, which specifies every other impl: a mask and an ordinary softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility_mask(
    visible_end: Tensor,
    positions: Tensor | None = None,
    window: int | None = None,
    visible_begin: Tensor | None = None,
) -> Tensor:
    """Return the ``(batch, seq, seq)`` bool mask, True where query (row) sees key (column).

    Args:
        visible_end: ``(batch, seq)`` int32.
        positions: ``(batch, seq)`` int32, needed with a window.
        window: how many positions a query looks back, itself included; None for all.
        visible_begin: ``(batch, seq)`` int32, or None if each token's is its own index.
    """
    index = torch.arange(visible_end.shape[-1], device=visible_end.device)
    begin = index[None, :] if visible_begin is None else visible_begin[:, None, :]
    query = index[:, None]
    mask = (begin <= query) & (query < visible_end[:, None, :])
    if window is not None:
        if positions is None:
            raise ValueError("a window is measured in positions: pass `positions` too")
        position = positions.long()  # no difference of two overflows
        mask &= position[:, :, None] - position[:, None, :] < window
    return mask


def dense_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_end: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible_begin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)` of tree attention by materializing all scores: O(seq^2) memory.

    Scores are accumulated in float32 (float64 for float64 inputs); autograd differentiates it.

    Args:
        q: ``(batch, heads, seq, d_qk)``.
        k: ``(batch, kv_heads, seq, d_qk)``.
        v: ``(batch, kv_heads, seq, d_v)``.
        visible_end: ``(batch, seq)`` int32.
        scale: factor of the scores.
        positions: ``(batch, seq)`` int32, needed with a window.
        window: as in `visibility_mask`.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``(heads,)``, one more logit per head that takes probability and gives no value.
        visible_begin: as in `visibility_mask`.

    Returns:
        ``out`` ``(batch, heads, seq, d_v)`` in q's dtype and ``lse`` ``(batch, heads, seq)``, the
        natural logarithm of the softmax's denominator, sink included.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = scale * (q.to(dtype) @ keys.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visibility_mask(visible_end, positions, window, visible_begin)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # Not exp(scores - lse): of huge scores, lse has lost what they add up to.
    probabilities = torch.softmax(scores, dim=-1)
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, None]
        probabilities = probabilities * torch.sigmoid(lse - sink)[..., None]
        lse = torch.logaddexp(lse, sink)
    return (probabilities @ values).to(q.dtype), lse
