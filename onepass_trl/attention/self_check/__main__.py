"""Checks one kernel on one device: what `process` starts.

python -m onepass_trl.attention.self_check DEVICE DTYPE D_QK D_V [UUID]
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys

import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call, ExtensionNotBuiltError
from onepass_trl.attention.implementations.cpu import CPU
from onepass_trl.attention.implementations.cuda import CUDA
from onepass_trl.attention.self_check.cases import hostile_cases
from onepass_trl.attention.self_check.comparison import mistake_in
from onepass_trl.attention.self_check.process import BEGINS, ENDS, TIME_LIMIT
from onepass_trl.attention.self_check.verdicts import Verdict
from onepass_trl.wording import counted


def main(arguments: list[str]) -> None:
    """Print each case before it runs, then the verdict."""
    # If the process that waits for this one is gone, nobody else ends a kernel that hangs.
    faulthandler.dump_traceback_later(TIME_LIMIT + 5, exit=True)
    # No dump of the memory of a device whose kernel crashes.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    name, dtype, d_qk, d_v, *uuid = arguments
    verdict = check(torch.device(name), getattr(torch, dtype), (int(d_qk), int(d_v)), *uuid)
    print(ENDS + json.dumps(verdict), flush=True)


def check(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], uuid: str | None = None
) -> Verdict:
    """Return what a check finds of the kernels for a device: of CUDA devices, that of a UUID."""
    implementation = {"cpu": CPU, "cuda": CUDA}[device.type]

    def run(call: Call) -> tuple[Tensor, Tensor]:
        implementation.check(call)
        return implementation.run(call)

    try:
        if uuid is not None:
            device = _device_of(uuid, device)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).cpu()
    except RuntimeError as error:
        return Verdict("not run", f"{device} can't be used: {_first_line(error)}")
    for case in hostile_cases(dtype, head_dims):
        print(BEGINS + case.name, flush=True)
        try:
            mistake = mistake_in(case, run, device, dtype)
        except (torch.OutOfMemoryError, MemoryError, ExtensionNotBuiltError) as error:
            return Verdict("not run", _first_line(error))
        except RuntimeError as error:
            return Verdict("failed", f"{_first_line(error)}, in: {case.name}")
        if mistake is not None:
            return Verdict("failed", mistake)
    return Verdict("passed")


def _device_of(uuid: str, likely: torch.device) -> torch.device:
    """Return the device of a UUID, most likely the one that the other process calls so."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in sorted(devices, key=lambda device: device != likely):
        if str(torch.cuda.get_device_properties(device).uuid) == uuid:
            return device
    raise RuntimeError(f"no device is {uuid}, of {counted(len(devices), 'visible device')}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main(sys.argv[1:])
