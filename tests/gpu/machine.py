"""Writes as JSON what a GPU machine is, and the two rates that bound every kernel on it.

python -m tests.gpu.machine build/machine.json
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from onepass_trl.attention import available_impls, cuda_library
from onepass_trl.tools.bench.timing import repeated_seconds

from .device import BF16, DEVICE, DRY_RUN

PACKAGES = ("torch", "triton", "transformers", "trl", "datasets", "numpy", "pytest")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def rates() -> dict[str, float]:
    """Return TFLOP/s of a large product in bfloat16, and TB/s of a copy, read and written."""
    device, side = torch.device(DEVICE), 128 if DRY_RUN else 8192
    a, b = (torch.randn(side, side, device=device, dtype=BF16) for _ in range(2))
    source = torch.randn(16 * side**2, device=device, dtype=BF16)
    target = torch.empty_like(source)
    product = min(repeated_seconds(lambda: a @ b, device, repeats=10, budget_s=2))
    copy = min(repeated_seconds(lambda: target.copy_(source), device, repeats=10, budget_s=2))
    return {
        "product_tflops": 2 * side**3 / product / 1e12,
        "copy_tb_per_s": 2 * source.numel() * source.element_size() / copy / 1e12,
    }


def describe() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "versions": versions(),
        "cuda": torch.version.cuda,
        "tools": {tool: shutil.which(tool) for tool in ("compute-sanitizer", "ncu", "nvcc")},
        "implementations": {status.name: status.detail for status in available_impls()},
    }
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", query, "--format=csv"]
        facts["nvidia-smi"] = subprocess.run(
            command, capture_output=True, text=True, timeout=20
        ).stdout
    if not DRY_RUN:
        properties = torch.cuda.get_device_properties()
        capability = torch.cuda.get_device_capability()
        facts |= {
            "device": properties.name,
            "capability": capability,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": properties.L2_cache_size / 2**20,
            "library_missing": cuda_library.missing(capability),
        }
    return facts | rates()


if __name__ == "__main__":
    text = json.dumps(describe(), indent=1)
    Path(sys.argv[1]).write_text(text + "\n")
    print(text)
