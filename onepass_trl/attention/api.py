"""`tree_attention`: validation, autocast and the choice of an implementation."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from onepass_trl.attention import cuda_library, ops
from onepass_trl.attention.flex import flex_tree_attention
from onepass_trl.attention.reference import dense_tree_attention

Impl = Literal["auto", "cuda", "cpu", "flex", "dense"]

BUILD_COMMAND = "pip install --no-build-isolation -e ."
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExtensionNotBuiltError(RuntimeError):
    """The compiled extension `onepass_trl._C` is missing or cannot be loaded."""


class ImplStatus(NamedTuple):
    """Whether one implementation can be used here."""

    name: str
    built: bool
    devices: tuple[str, ...]
    """Device types it runs on in this process."""
    detail: str
    """What it is, or why it cannot run and what to do."""


def available_impls() -> list[ImplStatus]:
    """Return the status of every implementation in this process, best first."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if ops.EXTENSION_ERROR is None:
        info = ops.build_info()
        cpu = ImplStatus("cpu", True, ("cpu",), f"{info['cpu_variant']}, {info['compiler']}")
    else:
        cpu = ImplStatus("cpu", False, (), _not_built_message())
    flex = "compiled FlexAttention" if "cuda" in devices else "torch sees no CUDA device"
    return [
        _cuda_status("cuda" in devices),
        cpu,
        ImplStatus("flex", True, devices[1:], flex),
        ImplStatus("dense", True, devices, "eager reference, O(seq^2) memory"),
    ]


def _cuda_status(has_device: bool) -> ImplStatus:
    capability = torch.cuda.get_device_capability() if has_device else None
    reason = cuda_library.missing(capability)
    build = cuda_library.BUILD
    if build is None:
        return ImplStatus("cuda", False, (), reason or "")
    head_dims = ", ".join(f"{d_qk}/{d_v}" for d_qk, d_v in build.head_dims)
    built = f"nvcc {build.nvcc}, sm_{', sm_'.join(build.archs)}, head sizes {head_dims}"
    if reason is None and capability is None:
        reason = "torch sees no CUDA device"
    if reason is not None:
        return ImplStatus("cuda", True, (), f"{built}; {reason}")
    chosen = sum(
        cuda_library.is_validated(capability, dtype, pair)  # type: ignore[arg-type]
        for dtype in cuda_library.DTYPES
        for pair in build.head_dims
    )
    total = len(cuda_library.DTYPES) * len(build.head_dims)
    return ImplStatus(
        "cuda",
        True,
        ("cuda",),
        f"{built}; {chosen} of {total} pairs of dtype and head size validated on this device: "
        "'auto' takes those, and 'flex' for the others",
    )


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
    impl: Impl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention in which query i sees key j iff ``j <= i < visible_end[j]``.

    Differentiable in q, k, v and sinks. Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: ``(batch, heads, seq, d_qk)``, on a CPU float32, float64 or bfloat16; "cuda" takes
            bfloat16 and float16.
        k: ``(batch, kv_heads, seq, d_qk)``; ``heads`` is a multiple of ``kv_heads``.
        v: ``(batch, kv_heads, seq, d_v)``.
        visible_end: ``(batch, seq)`` int32: key j is seen by the queries
            ``[j, visible_end[j])``. The intervals nest.
        scale: factor of the scores, ``1 / sqrt(d_qk)`` unless given; positive for "cuda".
        positions: ``(batch, seq)`` int32 position ids, needed with a window.
        window: query i also needs ``positions[i] - positions[j] < window`` to see key j.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``(heads,)`` floating, one more logit per head that takes probability and gives no
            value.
        impl: "auto" takes "cpu" for CPU tensors; for CUDA tensors "cuda" where it is built and
            validated for the device, dtype and head size, else "flex". Any other name is used or
            refused.
        return_lse: also return the natural logarithm of the softmax's denominator, sink included.

    Returns:
        ``out`` ``(batch, heads, seq, d_v)`` in the dtype of q, or ``(out, lse)`` with ``lse``
        ``(batch, heads, seq)`` float32 (float64 for float64 inputs). ``out.transpose(1, 2)`` is
        contiguous with "cpu" and "cuda". These also give the same bits every time, gradients too,
        but for the gradient of q on CUDA devices with ``d_qk = d_v <= 128``, where that takes
        ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError: an argument that does not fit the others, or that the implementation does not
            support.
        VisibilityError: `visible_end` is not a tree (a ValueError; checked by "cpu").
        ExtensionNotBuiltError: "cpu" or "cuda" without its compiled library.
    """
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v, visible_end)
    _check_options(q, visible_end, positions, window, softcap, sinks)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    chosen = _choose(impl, q, v, scale)
    if sinks is not None:
        sinks = sinks.to(ops.accumulation_dtype(q.dtype))
    if chosen in ("cpu", "cuda"):
        used_positions = None if window is None else positions
        plan = None
        if chosen == "cuda":
            plan = cuda_library.plan_of(visible_end, used_positions, window or 0)
        out, lse = torch.ops.onepass.tree_attention(
            q,
            k,
            v,
            visible_end,
            used_positions,
            sinks,
            scale,
            window or 0,
            softcap or 0.0,
            plan,
        )
    else:
        run = flex_tree_attention if chosen == "flex" else dense_tree_attention
        out, lse = run(
            q,
            k,
            v,
            visible_end,
            scale=scale,
            positions=positions,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(
        device_type
    ):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, visible_end: Tensor) -> None:
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
            f"q has {heads} heads, k {k.shape[1]} and v {v.shape[1]}: expected k and v to have the "
            "same number, dividing the number of q"
        )
    if visible_end.dtype != torch.int32 or visible_end.shape != (batch, seq):
        raise ValueError(
            f"visible_end is {visible_end.dtype} of shape {tuple(visible_end.shape)}, expected "
            f"torch.int32 of shape {(batch, seq)}"
        )
    for name, x in (("k", k), ("v", v), ("visible_end", visible_end)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device} as q")


def _check_options(
    q: Tensor,
    visible_end: Tensor,
    positions: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    if window is not None:
        if window < 1:
            raise ValueError(f"window is {window}, expected at least 1, or None for no window")
        if positions is None:
            raise ValueError("a window is measured in positions: pass `positions` too")
    if positions is not None:
        if positions.dtype != torch.int32 or positions.shape != visible_end.shape:
            raise ValueError(
                f"positions is {positions.dtype} of shape {tuple(positions.shape)}, expected "
                f"torch.int32 of shape {tuple(visible_end.shape)}"
            )
        if positions.device != q.device:
            raise ValueError(f"positions is on {positions.device}, expected {q.device} as q")
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


def _choose(impl: Impl, q: Tensor, v: Tensor, scale: float) -> str:
    device = q.device.type
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(get_args(Impl))}")
    if impl == "auto":
        if device not in ("cpu", "cuda"):
            raise ValueError(
                f"q is on {q.device}, and no implementation is validated for {device}: move the "
                "tensors to a CPU or CUDA device, or pass impl='flex' or 'dense'"
            )
        if device == "cpu":
            impl = "cpu"
        else:
            impl = "cuda" if _cuda_is_validated(q, v) and scale > 0 else "flex"
    if impl == "cuda":
        _check_cuda(q, v, scale)
    if impl == "cpu":
        if device != "cpu":
            raise ValueError(f"impl='cpu' and q is on {q.device}: use impl='auto'")
        if ops.EXTENSION_ERROR is not None:
            raise ExtensionNotBuiltError(_not_built_message()) from ops.EXTENSION_ERROR
        if q.dtype not in CPU_DTYPES:
            raise ValueError(_dtype_message("cpu", q.dtype, CPU_DTYPES))
    if impl == "flex" and q.dtype not in FLEX_DTYPES:
        raise ValueError(_dtype_message("flex", q.dtype, FLEX_DTYPES))
    return impl


def _cuda_is_validated(q: Tensor, v: Tensor) -> bool:
    capability = torch.cuda.get_device_capability(q.device)
    head_dims = (q.shape[3], v.shape[3])
    # The first is cheap and, so far, mostly false: this runs once per layer.
    return (
        cuda_library.is_validated(capability, q.dtype, head_dims)
        and cuda_library.missing(capability) is None
        and head_dims in cuda_library.BUILD.head_dims  # type: ignore[union-attr]
    )


def _check_cuda(q: Tensor, v: Tensor, scale: float) -> None:
    if q.device.type != "cuda":
        raise ValueError(f"impl='cuda' and q is on {q.device}: use impl='auto'")
    reason = cuda_library.missing(torch.cuda.get_device_capability(q.device))
    if reason is not None:
        raise ExtensionNotBuiltError(f"impl='cuda': {reason}, or use impl='flex'")
    if q.dtype not in cuda_library.DTYPES:
        raise ValueError(_dtype_message("cuda", q.dtype, cuda_library.DTYPES))
    head_dims, built = (q.shape[3], v.shape[3]), cuda_library.BUILD.head_dims  # type: ignore[union-attr]
    if head_dims not in built:
        wanted = ";".join(f"{d_qk}/{d_v}" for d_qk, d_v in (*built, head_dims))
        raise ValueError(
            f"impl='cuda': head sizes d_qk {head_dims[0]} and d_v {head_dims[1]}, and the library "
            f"is built for {', '.join(f'{d_qk}/{d_v}' for d_qk, d_v in built)}: use impl='flex', "
            "or, if they are multiples of 32 up to 256 and d_v is at most d_qk, rebuild it with "
            f"`ONEPASS_HEAD_DIMS='{wanted}' {cuda_library.BUILD_COMMAND}`"
        )
    if not scale > 0:
        raise ValueError(
            f"impl='cuda': scale is {scale}, expected a positive number; impl='flex' takes any"
        )


def _dtype_message(impl: str, dtype: torch.dtype, supported: tuple[torch.dtype, ...]) -> str:
    names = ", ".join(str(x) for x in supported)
    return f"impl={impl!r}: q is {dtype}, expected one of {names}"


def _not_built_message() -> str:
    return (
        f"the compiled extension onepass_trl._C cannot be loaded ({ops.EXTENSION_ERROR}): build it "
        f"with `{BUILD_COMMAND}` in the repository, or pass impl='dense' for small inputs"
    )
