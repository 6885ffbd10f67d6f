"""The compiled CUDA library `onepass_trl/_cuda.so`: what it holds, and where it can run.

It is loaded, and its implementations of the ops registered, when this module is imported and torch
is built with CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from onepass_trl.attention import ops  # noqa: F401 (defines what the library implements)
from onepass_trl.attention.library_files import load
from onepass_trl.attention.remembered import Remembered

PATH = Path(__file__).parents[1] / "_cuda.so"
VALIDATED = Path(__file__).with_name("validated.json")
BUILD_COMMAND = "make cuda"
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
"""(d_qk, d_v) of the kernels that are built unless ONEPASS_HEAD_DIMS says otherwise."""
OLDEST_CAPABILITY = (8, 0)


class CudaBuild(NamedTuple):
    """What the library was built for."""

    nvcc: str
    archs: tuple[str, ...]
    """Compute capabilities, such as "80", "90a", or "80+PTX", which later devices can use too."""
    head_dims: tuple[tuple[int, int], ...]
    """Pairs (d_qk, d_v)."""
    source: str
    """Digest of the sources."""

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the code of one of the architectures runs on this capability."""
        major, minor = capability
        for arch in self.archs:
            built = divmod(int(arch.removesuffix("+PTX").rstrip("a")), 10)
            if arch.endswith("a"):
                fits = built == capability
            elif arch.endswith("+PTX"):
                fits = built <= capability
            else:
                fits = built[0] == major and built[1] <= minor
            if fits:
                return True
        return False


def read_build(library: Path = PATH) -> CudaBuild | None:
    """Return what the library at a path was built for, None if there is none.

    Raises OSError if the file next to it, which says so, isn't there or can't be understood.
    """
    if not library.exists():
        return None
    facts_file = library.with_suffix(".json")
    try:
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        return CudaBuild(
            nvcc=facts["nvcc"],
            archs=tuple(facts["archs"]),
            head_dims=tuple((d_qk, d_v) for d_qk, d_v in facts["head_dims"]),
            source=facts["source"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"{facts_file.name} doesn't say what it is built for: {error!r}") from error


def missing(capability: tuple[int, int] | None) -> str | None:
    """Return why the library cannot be used on a device, and what to do; None if it can.

    Args:
        capability: compute capability of the device, None for the library as such.
    """
    if LOAD_ERROR is not None:
        return (
            f"{PATH} cannot be loaded ({LOAD_ERROR}): install the wheel again, or rebuild it with "
            f"`{BUILD_COMMAND}`"
        )
    if BUILD is None:
        return f"the CUDA library is not built: build it with `{BUILD_COMMAND}` (needs nvcc)"
    if not torch_has_cuda():
        return "this torch is built without CUDA: install a CUDA build of torch"
    if capability is None:
        return None
    number = "".join(map(str, capability))
    if capability < OLDEST_CAPABILITY:
        return f"the CUDA kernels need compute capability 8.0 and the device has {number}"
    if not BUILD.runs_on(capability):
        # The "a" is what the Hopper kernels need; without it there are the portable ones only.
        wanted = ";".join((*BUILD.archs, "90a" if number == "90" else number))
        return (
            f"the CUDA library is built for compute capabilities {', '.join(BUILD.archs)} and the "
            f"device has {number}: rebuild it with `ONEPASS_CUDA_ARCHS='{wanted}' {BUILD_COMMAND}`"
        )
    return None


def is_validated(
    capability: tuple[int, int], dtype: torch.dtype, head_dims: tuple[int, int]
) -> bool:
    """Whether `make test-gpu` has passed on such a device, with a library of the same sources."""
    entry = [list(capability), str(dtype).removeprefix("torch."), list(head_dims)]
    return BUILD is not None and entry in validated_kernels(BUILD.source)


def validated_kernels(source: str) -> list[list[object]]:
    """Return the entries of validated.json, none if they are of other sources than these."""
    validated = json.loads(VALIDATED.read_text(encoding="utf-8"))
    return validated["kernels"] if validated["source"] == source else []


def _open() -> tuple[CudaBuild | None, OSError | None]:
    """Return what the library is built for, and why it can't be loaded where torch has CUDA."""
    try:
        build = read_build()
    except OSError as error:
        return None, error
    usable = build is not None and torch_has_cuda()
    return build, load(PATH) if usable else None


def torch_has_cuda() -> bool:
    """Return whether torch is built for CUDA; builds for AMD devices call theirs so too."""
    return torch.version.cuda is not None


def plan_of(visible_end: torch.Tensor, positions: torch.Tensor | None, window: int) -> torch.Tensor:
    """Return the plan of these tensors, made once for as long as they live unchanged.

    Args:
        visible_end: ``(batch, seq)`` int32 on a CUDA device.
        positions: ``(batch, seq)`` int32, or None without a window.
        window: 0 for none.

    Returns:
        ``(batch, ops.plan_size(seq))`` int32 on the same device.
    """
    return _plans.get(
        visible_end,
        () if positions is None else (positions,),
        window,
        lambda: torch.ops.onepass.tree_plan(visible_end, positions, window),
    )


_plans: Remembered[torch.Tensor] = Remembered()
BUILD, LOAD_ERROR = _open()
