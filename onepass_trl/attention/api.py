"""`tree_attention`: the op as people call it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onepass_trl.attention import ops
from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.registry import Impl, choose
from onepass_trl.attention.validation import check_options, check_tensors


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_end: Tensor,
    *,
    scale: float | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible_begin: Tensor | None = None,
    impl: Impl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention in which query i sees key j iff ``j <= i < visible_end[j]``.

    With `visible_begin`, iff ``visible_begin[j] <= i < visible_end[j]``. Differentiable in q, k, v
    and sinks. Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: ``(batch, heads, seq, d_qk)``, on a CPU float32, float64 or bfloat16; "cuda" takes
            bfloat16 and float16.
        k: ``(batch, kv_heads, seq, d_qk)``; ``heads`` is a multiple of ``kv_heads``.
        v: ``(batch, kv_heads, seq, d_v)``.
        visible_end: ``(batch, seq)`` int32: key j is seen by the queries
            ``[j, visible_end[j])``. The intervals nest.
        scale: factor of the scores, ``1 / sqrt(d_qk)`` unless given; positive for "cuda".
        positions: ``(batch, seq)`` int32 position ids, none negative, needed with a window.
        window: query i also needs ``positions[i] - positions[j] < window`` to see key j.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``(heads,)`` floating, one more logit per head that takes probability and gives no
            value.
        visible_begin: ``(batch, seq)`` int32, for rows with blocks that see themselves in both
            directions, as some models see images: the block's first token for each token of it,
            and j for all other tokens j. The tokens of a block have the same `visible_end`.
        impl: "auto" takes "cpu" for CPU tensors; for CUDA tensors "cuda" where it is built and has
            passed tests on such a device with this dtype and head size, or a check, which the first
            call runs in a process of its own, else "varlen" (FlashAttention of torch: bfloat16 and
            float16, head sizes up to 256, no softcap, not under torch.compile), else "flex". Any
            other name is used, unchecked, or refused. "flex_flash" is FlexAttention by the kernels
            of flash-attn-4: torch 2.13, compute capability 9.0 or 10.x, bfloat16 and float16, no
            sinks. With `visible_begin` only "cpu", "flex" and "dense" can run.
        return_lse: also return the natural logarithm of the softmax's denominator, sink included.
            "varlen" has no gradient through it.

    Returns:
        ``out`` ``(batch, heads, seq, d_v)`` in the dtype of q, or ``(out, lse)`` with ``lse``
        ``(batch, heads, seq)`` float32 (float64 for float64 inputs). ``out.transpose(1, 2)`` is
        contiguous with "cpu" and "cuda". These also give the same bits every time, gradients too,
        but for the gradient of q on CUDA devices with ``d_qk = d_v <= 128``, where that takes
        ``torch.use_deterministic_algorithms(True)``.

        With "cpu", NaN and infinities in q, k and v reach only the outputs and gradients of what
        sees them, and sinks may be infinite; with the others they may spread to other tokens.
        Gradients of "cpu" and "cuda" take probabilities from the logarithm that ``lse`` is, so
        their relative error is up to the largest score times 6e-8 in float32: scores of 1e7, which
        no model has, give gradients that aren't normalized.

    Raises:
        ValueError: an argument that does not fit the others, or that the implementation does not
            support.
        VisibilityError: `visible_end` is not a tree, or `visible_begin` doesn't have its blocks in
            it (a ValueError; checked by "cpu").
        ExtensionNotBuiltError: "cpu" or "cuda" without its compiled library.
    """
    q, k, v = _autocast(q, k, v)
    check_tensors(q, k, v, visible_end)
    check_options(q, visible_end, positions, window, softcap, sinks, visible_begin)
    call = Call(
        q,
        k,
        v,
        visible_end,
        scale=1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        positions=None if window is None else positions,
        window=window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(ops.accumulation_dtype(q.dtype)),
        visible_begin=visible_begin,
    )
    out, lse = choose(impl, call).run(call)
    return (out, lse) if return_lse else out


@torch.compiler.assume_constant_result  # dynamo of torch 2.11 can't trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
