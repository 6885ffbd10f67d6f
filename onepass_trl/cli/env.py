"""`onepass-trl env`: what a bug report needs to say. Works whatever is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

from onepass_trl.cli import Parser
from onepass_trl.versions import TESTED

_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "numpy",
    "scipy",
)


def main(argv: list[str]) -> int:
    """Print one ``name: value`` line each; return 1 if ``--check`` finds a wrong kernel, else 0."""
    parser = Parser(
        prog="onepass-trl env", description="Print versions, attention implementations and devices."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also check every CUDA kernel on the devices of this machine, some 15 seconds each, "
        "and remember what is found",
    )
    arguments = parser.parse_args(argv)
    for name, value in _facts():
        print(f"{name}: {value}", flush=True)
    if not arguments.check:
        return 0
    print("\nCUDA kernels: device, dtype, head sizes, what the check finds")
    failed = False
    for device, dtype, head_dims, result in _checks():
        print(f"{device}  {dtype:8}  {head_dims:7}  {result}", flush=True)
        failed |= result.startswith("failed")
    return int(failed)


def _facts() -> Iterator[tuple[str, str]]:
    from onepass_trl import __version__

    yield "onepass_trl", __version__
    yield "platform", platform.platform()
    yield "python", platform.python_version()
    for package in _PACKAGES:
        tested = f" (tested up to {TESTED[package]})" if package in TESTED else ""
        yield package, _version(package) + tested
    try:
        import torch
    except (
        ImportError
    ) as error:  # also a broken installation: a library of torch that does not load
        yield "torch", f"cannot be imported: {error}"
        return
    yield "threads", f"{torch.get_num_threads()} (of {os.cpu_count()} CPUs)"
    yield from _devices()
    yield from _attention()
    yield from _recurrences()


def _checks() -> Iterator[tuple[str, str, str, str]]:
    """Yield device, dtype, head sizes and result of each kernel, on one device of each kind."""
    import torch

    from onepass_trl.attention import cuda_library
    from onepass_trl.attention.self_check.decision import verdict_on

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names:
        yield "none", "any", "any", "not run: torch sees no CUDA device"
    for name in dict.fromkeys(names):
        device = torch.device("cuda", names.index(name))
        reason = cuda_library.missing(torch.cuda.get_device_capability(device))
        if reason is not None:
            yield name, "any", "any", f"not built: {reason}"
            continue
        assert cuda_library.BUILD is not None
        built = cuda_library.BUILD.head_dims
        for dtype in cuda_library.DTYPES:
            for pair in dict.fromkeys((*cuda_library.HEAD_DIMS, *built)):
                result = "not built"
                if pair in built:
                    verdict = verdict_on(device, dtype, pair, again=True)
                    result = ": ".join(filter(None, verdict))
                yield name, str(dtype).removeprefix("torch."), f"{pair[0]}/{pair[1]}", result


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield "devices", "cpu"
        return
    if accelerator.type != "cuda":
        yield "devices", f"{torch.accelerator.device_count()} x {accelerator.type}"
        return
    yield "cuda", f"{torch.version.cuda or torch.version.hip} (of this torch)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )


def _attention() -> Iterator[tuple[str, str]]:
    from onepass_trl.attention import available_impls

    for status in available_impls():
        state = f"usable on {', '.join(status.devices)}" if status.devices else "not usable"
        yield f"attention {status.name}", f"{state} ({status.detail})"


def _recurrences() -> Iterator[tuple[str, str]]:
    """Who computes the layers that carry state."""
    from onepass_trl.attention.branching.fla_rule import installed_fla
    from onepass_trl.attention.branching.packages import (
        CONVOLUTION,
        FLA,
        MAMBA,
        NAMES,
        import_problem,
    )

    fla = installed_fla()
    if fla.backend is not None:
        yield "linear attention", f"flash-linear-attention ({fla.detail}), a call for a tree"
    elif (problem := import_problem(FLA)) is not None:
        yield "linear attention", f"PyTorch ({problem})"
    else:
        yield (
            "linear attention",
            f"flash-linear-attention ({fla.detail}), a call for segments of one depth and length",
        )
    # transformers calls the kernels of these packages where they are there.
    for layers, module in (("Mamba 2", MAMBA), ("short convolutions", CONVOLUTION)):
        package, problem = NAMES[module], import_problem(module)
        yield (
            layers,
            f"{package} {_version(package)}" if problem is None else f"PyTorch ({problem})",
        )
