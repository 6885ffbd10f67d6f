"""The compiled kernel for CPUs, `csrc/cpu`, in the extension `onepass_trl._C`."""

from __future__ import annotations

import torch

from onepass_trl.attention import ops
from onepass_trl.attention.implementations.base import (
    Call,
    ExtensionNotBuiltError,
    Implementation,
    ImplStatus,
    check_dtype,
    run_op,
)

BUILD_COMMAND = "pip install --no-build-isolation -e ."
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _status() -> ImplStatus:
    if ops.EXTENSION_ERROR is not None:
        return ImplStatus("cpu", False, (), _not_built_message())
    info = ops.build_info()
    return ImplStatus("cpu", True, ("cpu",), f"{info['cpu_variant']}, {info['compiler']}")


def _suits(call: Call) -> bool:
    return call.q.device.type == "cpu"


def _check(call: Call) -> None:
    if call.q.device.type != "cpu":
        raise ValueError(f"impl='cpu' and q is on {call.q.device}: use impl='auto'")
    if ops.EXTENSION_ERROR is not None:
        raise ExtensionNotBuiltError(_not_built_message()) from ops.EXTENSION_ERROR
    check_dtype("cpu", call, DTYPES)


def _not_built_message() -> str:
    return (
        f"the compiled extension onepass_trl._C cannot be loaded ({ops.EXTENSION_ERROR}): build it "
        f"with `{BUILD_COMMAND}` in the repository, or pass impl='dense' for small inputs"
    )


CPU = Implementation("cpu", _status, _check, run_op, _suits)
