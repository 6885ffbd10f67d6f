"""Whether "auto" takes the CUDA kernels: those that tests have validated, or a check has."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from functools import cache
from pathlib import Path

import torch

from onepass_trl import __version__
from onepass_trl.attention import cuda_library
from onepass_trl.attention.self_check.process import check_in_process
from onepass_trl.attention.self_check.verdicts import Subject, Verdict, check_once, recall

logger = logging.getLogger(__name__)

SWITCH = "ONEPASS_SELF_CHECK"
_DRIVER_VERSION = Path("/sys/module/nvidia/version")


@torch.compiler.assume_constant_result  # compiled code has the answer in it
def is_proven(device_index: int, dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    """Return whether the CUDA kernels for a dtype and head sizes are to be trusted on a device.

    If no test has run them on such a device, the first call may run a check, which takes seconds.
    """
    return _decide(device_index, dtype, head_dims)


@cache
def _decide(device_index: int, dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    capability = torch.cuda.get_device_capability(device_index)
    kernels = _name(dtype, head_dims)
    reason = cuda_library.missing(capability)
    if reason is not None:
        # Older devices, and those of others, were never meant to have them.
        if (
            cuda_library.PATH.exists()
            and cuda_library.torch_has_cuda()
            and capability >= cuda_library.OLDEST_CAPABILITY
        ):
            logger.warning("attention_impl='auto' can't take the CUDA kernels: %s", reason)
        return False
    if cuda_library.is_validated(capability, dtype, head_dims):
        return True
    if not _is_switched_on():
        logger.warning(
            "%s=0: attention_impl='auto' takes others than the CUDA kernels for %s, which no test "
            "has run on %s",
            SWITCH,
            kernels,
            torch.cuda.get_device_name(device_index),
        )
        return False
    verdict = verdict_on(torch.device("cuda", device_index), dtype, head_dims)
    if verdict.outcome == "passed":
        return True
    if verdict.outcome == "failed":
        logger.warning(
            "the CUDA kernels for %s are wrong on %s, so attention_impl='auto' takes slower "
            "ones: %s. Please report this, with the output of `onepass-trl env --check`",
            kernels,
            torch.cuda.get_device_name(device_index),
            verdict.detail,
        )
    else:
        logger.warning(
            "the CUDA kernels for %s couldn't be checked, so attention_impl='auto' takes slower "
            "ones: %s. `onepass-trl env --check` checks them beforehand",
            kernels,
            verdict.detail,
        )
    return False


def verdict_on(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], *, again: bool = False
) -> Verdict:
    """Return what the check of a kernel has found on devices like this; it runs unless it has.

    Args:
        device: a CUDA device of this process.
        dtype: of the kernel.
        head_dims: (d_qk, d_v).
        again: whether to check even if a verdict is remembered.
    """

    subject = _subject(device, dtype, head_dims)

    def check() -> Verdict:
        begin = time.monotonic()
        verdict = check_in_process(device, dtype, head_dims)
        if verdict.outcome == "passed":
            logger.info(
                "the CUDA kernels for %s, which no test has run on %s, have passed a check, in "
                "%.0f seconds",
                _name(dtype, head_dims),
                subject.device,
                time.monotonic() - begin,
            )
        return verdict

    return check_once(subject, check, again=again)


def is_known_to_pass(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    """Return whether a kernel is validated, or its check has passed on a device like this."""
    if cuda_library.is_validated(torch.cuda.get_device_capability(device), dtype, head_dims):
        return True
    verdict = recall(_subject(device, dtype, head_dims))
    return verdict is not None and verdict.outcome == "passed"


def _is_switched_on() -> bool:
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {value!r}, expected 0 or 1")
    return value == "1"


def _subject(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> Subject:
    return Subject(
        device=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        driver=_driver_version(),
        torch=torch.__version__,
        package=__version__,
        library=_library_digest(),
        family=os.environ.get("ONEPASS_CUDA_FAMILY", ""),
        dtype=str(dtype).removeprefix("torch."),
        head_dims=head_dims,
    )


def _driver_version() -> str:
    try:
        return _DRIVER_VERSION.read_text().strip()
    except OSError:  # as in Windows' subsystem for Linux
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


@cache
def _library_digest() -> str:
    with cuda_library.PATH.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(dtype: torch.dtype, head_dims: tuple[int, int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} and head sizes {head_dims[0]}/{head_dims[1]}"
