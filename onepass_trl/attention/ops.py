"""The op ``onepass::tree_attention``: schema, fake implementation and autograd of all devices.

The CPU implementation is `csrc/cpu/tree_attention.cpp`, registered by `implementations.cpu`, the
CUDA one `csrc/cuda/api.cpp`, registered by `cuda_library`. Importing this module works without
either. Arguments, once for both ops:

- ``q`` ``(batch, heads, seq, d_qk)``, ``k`` ``(batch, kv_heads, seq, d_qk)``, ``v`` ``(batch,
  kv_heads, seq, d_v)`` of one dtype, any strides (free of copies where the last dimension is
  contiguous);
- ``visible_end`` ``(batch, seq)`` int32; ``positions`` ``(batch, seq)`` int32, read only with a
  window; ``visible_begin`` ``(batch, seq)`` int32, or None if each token's is its own index: only
  the CPU implementation takes it;
- ``sinks`` ``(heads,)`` in the dtype of lse;
- ``window`` 0 for none; ``softcap`` 0.0 for none;
- ``plan``, on CUDA devices, what ``onepass::tree_plan`` has made of the same ``visible_end``,
  ``positions`` and ``window``, ``(batch, plan_size(seq))`` int32; None to make it once more;
- ``deterministic``: the same bits every time; False may be faster on CUDA devices;
- ``out`` ``(batch, heads, seq, d_v)`` in q's dtype, laid out so that ``out.transpose(1, 2)`` is
  contiguous;
- ``lse`` ``(batch, heads, seq)``, float64 for float64 inputs, else float32: natural logarithm, sink
  included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("onepass", "DEF")
_library.define(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor visible_end, Tensor? positions, Tensor? "
    "sinks, float scale, int window, float softcap, Tensor? plan=None, Tensor? "
    "visible_begin=None) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "tree_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor visible_end, Tensor? positions, Tensor? sinks, float scale, int window, "
    "float softcap, Tensor? plan=None, bool deterministic=False, Tensor? visible_begin=None) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "tree_plan(Tensor visible_end, Tensor? positions, int window) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define("cpu_build() -> str")  # the instruction set in use and the compiler


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of lse and sinks: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_heads_last(like: Tensor, width: int | torch.SymInt) -> Tensor:
    batch, heads, seq, _ = like.shape
    return like.new_empty((batch, seq, heads, width)).transpose(1, 2)


@torch.library.register_fake("onepass::tree_attention", lib=_library)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_end: Tensor,
    positions: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    plan: Tensor | None = None,
    visible_begin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = _empty_heads_last(q, v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("onepass::tree_attention_backward", lib=_library)
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_end: Tensor,
    positions: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    plan: Tensor | None = None,
    deterministic: bool = False,
    visible_begin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty_heads_last(x, x.shape[3]) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty((0,) if sinks is None else sinks.shape)


def plan_size(seq: int | torch.SymInt) -> int | torch.SymInt:
    """Return the int32 per row of a plan; `csrc/cuda/plan.h` says what they are."""
    tiles = (seq + 63) // 64
    return 4 * (tiles + tiles + (tiles + 1) // 2)


@torch.library.register_fake("onepass::tree_plan", lib=_library)
def _(visible_end: Tensor, positions: Tensor | None, window: int) -> Tensor:
    batch, seq = visible_end.shape
    return visible_end.new_empty((batch, plan_size(seq)))


_ARGUMENTS = tuple(x.name for x in torch.ops.onepass.tree_attention.default._schema.arguments)
_SCORING = ("scale", "window", "softcap")
_TENSORS = tuple(name for name in _ARGUMENTS if name not in _SCORING)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = dict(zip(_ARGUMENTS, inputs, strict=True))
    ctx.scoring = {name: given[name] for name in _SCORING}
    ctx.save_for_backward(*output, *(given[name] for name in _TENSORS))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *saved = ctx.saved_tensors
    tensors = dict(zip(_TENSORS, saved, strict=True))
    dq, dk, dv, dsinks = torch.ops.onepass.tree_attention_backward(
        dout=torch.zeros_like(out) if dout is None else dout,
        dlse=dlse,
        out=out,
        lse=lse,
        **tensors,
        **ctx.scoring,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    gradients = {"q": dq, "k": dk, "v": dv, "sinks": None if tensors["sinks"] is None else dsinks}
    return tuple(gradients.get(name) for name in _ARGUMENTS)


torch.library.register_autograd(
    "onepass::tree_attention", _backward, setup_context=_setup_context, lib=_library
)


def _not_twice(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError(
        "tree attention can't be differentiated twice with the compiled kernels, as a gradient "
        "penalty or a Hessian product would need. Use impl='dense'"
    )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for inputs with a tangent: the op would drop it."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "tree attention can't be differentiated in forward-mode with the compiled kernels, as "
            "torch.func.jvp would need. Use impl='dense'"
        )


torch.library.register_autograd("onepass::tree_attention_backward", _not_twice, lib=_library)
