"""What every benchmark result states, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from onepass_trl.tools.outputs import write_output

_PACKAGES = ("torch", "transformers", "trl", "tokenizers", "numpy", "fla-core")
_REPOSITORY = Path(__file__).parents[3]
_NO_RESULTS = ":(exclude)benchmarks/results"


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
    """Return the package's commit, with "-dirty" if files other than results have changed.

    "unknown" for an installed package: a repository around it would be another one. A copy without
    the history, on another machine, is told in ONEPASS_COMMIT.
    """
    if told := os.environ.get("ONEPASS_COMMIT"):
        return told
    if not (_REPOSITORY / ".git").exists():
        return "unknown"
    try:
        # A run of all benchmarks changes the results one after another.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", _NO_RESULTS)
        described = _git("describe", "--always")
    except FileNotFoundError:  # no git
        return "unknown"
    return f"{described}{'-dirty' if changed else ''}" if described else "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=_REPOSITORY
    ).stdout.strip()


def write(
    path: str | Path,
    name: str,
    results: list[dict[str, Any]],
    command: Sequence[str] | None = None,
) -> None:
    """Write `results` with the command, machine, versions, commit and date to a JSON file.

    Args:
        name: of the benchmark.
        results: flat dicts.
        command: the command that was run; by default the script of this process.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if command is None:
        script = Path(sys.argv[0])
        command = ["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]]
    content = {
        "name": name,
        "command": shlex.join(command),
        "machine": machine(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "results": results,
    }
    write_output(path, json.dumps(content, indent=2) + "\n")
