"""The compiled kernel for CPUs, `csrc/cpu`, in the library `onepass_trl/_cpu.so`.

The library is loaded, and its implementations of the ops registered, when this module is imported.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import (
    Call,
    ExtensionNotBuiltError,
    Implementation,
    ImplStatus,
    check_dtype,
    run_op,
)
from onepass_trl.attention.library_files import load
from onepass_trl.attention.ops import refuse_forward_mode
from onepass_trl.visibility import check_visible_begin, check_visible_end

PATH = Path(__file__).parents[2] / "_cpu.so"
BUILD_COMMAND = "pip install --no-build-isolation -e ."
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


LOAD_ERROR = load(PATH)


def _status() -> ImplStatus:
    if LOAD_ERROR is not None:
        return ImplStatus("cpu", False, (), _not_built_message())
    return ImplStatus("cpu", True, ("cpu",), torch.ops.onepass.cpu_build())


def _suits(call: Call) -> bool:
    return call.q.device.type == "cpu"


def _check(call: Call) -> None:
    if call.q.device.type != "cpu":
        raise ValueError(f"impl='cpu' and q is on {call.q.device}: use impl='auto'")
    if LOAD_ERROR is not None:
        raise ExtensionNotBuiltError(_not_built_message()) from LOAD_ERROR
    check_dtype("cpu", call, DTYPES)


def _not_built_message() -> str:
    return (
        f"the compiled library onepass_trl/_cpu.so cannot be loaded ({LOAD_ERROR}): build it with "
        f"`{BUILD_COMMAND}` in the repository, or pass impl='dense' for small inputs"
    )


def _run(call: Call) -> tuple[Tensor, Tensor]:
    refuse_forward_mode(call.q, call.k, call.v, call.sinks)
    try:
        return run_op(call)
    except RuntimeError:
        # The kernel refuses rows that are no tree, and the definition says what is wrong with them.
        for number, row in enumerate(call.visible_end):
            check_visible_end(row.numpy())
            if call.visible_begin is not None:
                check_visible_begin(call.visible_begin[number].numpy(), row.numpy())
        if call.positions is not None and (least := int(call.positions.min())) < 0:
            raise ValueError(
                f"positions has {least}, expected none negative: the token's index in its pass"
            ) from None
        raise


CPU = Implementation("cpu", _status, _check, _run, _suits)
