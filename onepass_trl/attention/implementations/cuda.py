"""The compiled kernels for CUDA devices, `csrc/cuda`, in the library `onepass_trl/_cuda.so`."""

from __future__ import annotations

import torch
from torch import Tensor

from onepass_trl.attention import cuda_library
from onepass_trl.attention.implementations.base import (
    Call,
    ExtensionNotBuiltError,
    Implementation,
    ImplStatus,
    check_dtype,
    refuse_blocks,
    run_op,
)
from onepass_trl.attention.ops import refuse_forward_mode
from onepass_trl.attention.self_check.decision import is_known_to_pass, is_proven

DTYPES = cuda_library.DTYPES


def _status() -> ImplStatus:
    has_device = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_device else None
    reason = cuda_library.missing(capability)
    build = cuda_library.BUILD
    if build is None:
        return ImplStatus("cuda", False, (), reason or "")
    built = f"nvcc {build.nvcc}, sm_{', sm_'.join(build.archs)}, head sizes "
    built += _names(build.head_dims)
    if reason is None and capability is None:
        reason = "torch sees no CUDA device"
    if reason is not None:
        return ImplStatus("cuda", True, (), f"{built}; {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    proven = [is_known_to_pass(device, dtype, pair) for dtype in DTYPES for pair in build.head_dims]
    return ImplStatus(
        "cuda",
        True,
        ("cuda",),
        f"{built}; {sum(proven)} of {len(proven)} pairs of dtype and head size have passed on such "
        "a device: 'auto' takes those, and checks another when it first meets it",
    )


def _suits(call: Call) -> bool:
    device, build = call.q.device, cuda_library.BUILD
    if device.type != "cuda" or call.visible_begin is not None:
        return False
    if build is not None and (
        call.q.dtype not in DTYPES or _head_dims(call) not in build.head_dims or call.scale <= 0
    ):
        return False
    return is_proven(device.index, call.q.dtype, _head_dims(call))


def _check(call: Call) -> None:
    if call.q.device.type != "cuda":
        raise ValueError(f"impl='cuda' and q is on {call.q.device}: use impl='auto'")
    reason = cuda_library.missing(torch.cuda.get_device_capability(call.q.device))
    if reason is not None:
        raise ExtensionNotBuiltError(f"impl='cuda': {reason}, or use impl='flex'")
    check_dtype("cuda", call, DTYPES)
    refuse_blocks("cuda", call)
    head_dims, built = _head_dims(call), _built_head_dims()
    if head_dims not in built:
        wanted = ";".join(f"{d_qk}/{d_v}" for d_qk, d_v in (*built, head_dims))
        raise ValueError(
            f"impl='cuda': head sizes d_qk {head_dims[0]} and d_v {head_dims[1]}, and the "
            f"library is built for {_names(built)}: use impl='flex', or, if they are multiples "
            "of 32 up to 256 and d_v is at most d_qk, rebuild it with "
            f"`ONEPASS_HEAD_DIMS='{wanted}' {cuda_library.BUILD_COMMAND}`"
        )
    if not call.scale > 0:
        raise ValueError(
            f"impl='cuda': scale is {call.scale}, expected a positive number; impl='flex' takes any"
        )


def _run(call: Call) -> tuple[Tensor, Tensor]:
    refuse_forward_mode(call.q, call.k, call.v, call.sinks)
    plan = cuda_library.plan_of(call.visible_end, call.positions, call.window or 0)
    return run_op(call, plan)


def _head_dims(call: Call) -> tuple[int, int]:
    return call.q.shape[3], call.v.shape[3]


def _built_head_dims() -> tuple[tuple[int, int], ...]:
    assert cuda_library.BUILD is not None
    return cuda_library.BUILD.head_dims


def _names(head_dims: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{d_qk}/{d_v}" for d_qk, d_v in head_dims)


CUDA = Implementation("cuda", _status, _check, _run, _suits)
