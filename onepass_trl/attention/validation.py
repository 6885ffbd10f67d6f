"""Checks of what `tree_attention` is given, in the words of its users.

The compiled kernels assert again what their memory safety needs, since the ops can be called
without these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onepass_trl.wording import counted


def check_tensors(q: Tensor, k: Tensor, v: Tensor, visible_end: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices of the tensors fit each other."""
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (batch, heads, seq, head_dim)")
    batch, heads, seq, d_qk = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[0] != batch or x.shape[2] != seq:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected (batch {batch}, kv_heads, seq {seq}, "
                "head_dim) as in q; tree attention has no KV cache"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, expected {q.dtype} as q: cast it first")
    if k.shape[3] != d_qk or d_qk == 0:
        raise ValueError(f"k has head_dim {k.shape[3]} and q {d_qk}, expected the same, at least 1")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"q has {counted(heads, 'head')}, k {k.shape[1]} and v {v.shape[1]}: expected k and v "
            "to have the same number, dividing the number of q"
        )
    if visible_end.dtype != torch.int32 or visible_end.shape != (batch, seq):
        raise ValueError(
            f"visible_end is {visible_end.dtype} of shape {tuple(visible_end.shape)}, expected "
            f"torch.int32 of shape {(batch, seq)}"
        )
    for name, x in (("k", k), ("v", v), ("visible_end", visible_end)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device} as q")


def check_options(
    q: Tensor,
    visible_end: Tensor,
    positions: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    visible_begin: Tensor | None = None,
) -> None:
    """Raise ValueError unless the options are valid and fit the tensors."""
    if window is not None:
        if window < 1:
            raise ValueError(f"window is {window}, expected at least 1, or None for no window")
        if positions is None:
            raise ValueError("a window is measured in positions: pass `positions` too")
    for name, x in (("positions", positions), ("visible_begin", visible_begin)):
        if x is None:
            continue
        if x.dtype != torch.int32 or x.shape != visible_end.shape:
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected torch.int32 of shape "
                f"{tuple(visible_end.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device} as q")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number, or None for no cap")
    if sinks is not None:
        if sinks.shape != q.shape[1:2] or not sinks.is_floating_point():
            raise ValueError(
                f"sinks is {sinks.dtype} of shape {tuple(sinks.shape)}, expected a floating dtype "
                f"and one per head: {tuple(q.shape[1:2])}"
            )
        if sinks.device != q.device:
            raise ValueError(f"sinks is on {sinks.device}, expected {q.device} as q")
