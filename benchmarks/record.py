"""What every benchmark result states, and where it is written."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "trl", "tokenizers", "numpy")


def machine() -> dict[str, Any]:
    """Return the processor, the accelerator if any, and the number of threads in use."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": device,
    }


def commit() -> str:
    """Return the commit, with "-dirty" if files have changed; "unknown" outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except FileNotFoundError:  # no git
        described = ""
    return described or "unknown"


def write(path: str | Path, name: str, results: list[dict[str, Any]]) -> None:
    """Write `results`, a list of flat dicts, with the command, machine, versions, commit and date
    to a JSON file."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    script = Path(sys.argv[0])
    record = {
        "name": name,
        "command": shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "results": results,
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n")
