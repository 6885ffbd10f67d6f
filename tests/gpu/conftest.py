"""Skips the folder where there is no GPU, and writes what has passed for every kernel.

The results go to build/test_gpu.json or to the path in ONEPASS_TEST_GPU_RESULTS;
`record_validation.py` reads them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from onepass_trl.attention import cuda_library

from .device import DEVICE, DRY_RUN, Kernel

HERE = Path(__file__).parent
RESULTS = Path(
    os.environ.get("ONEPASS_TEST_GPU_RESULTS", HERE.parents[1] / "build" / "test_gpu.json")
)
REASON = "torch sees no CUDA device"

_collected: Counter[Kernel] = Counter()
_passed: Counter[Kernel] = Counter()
_failed: Counter[Kernel] = Counter()


def _kernel_of(item: pytest.Item) -> Kernel | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("kernel")


@pytest.hookimpl(tryfirst=True)  # before -k and -m leave any out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        # Compilers warn of much that is not ours.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not DRY_RUN and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=REASON))
        kernel = _kernel_of(item)
        if kernel is not None:
            _collected[kernel] += 1


@pytest.fixture(autouse=True)
def library() -> None:
    """The CUDA library has to be there: no test falls back to something else."""
    if not DRY_RUN:
        reason = cuda_library.missing(torch.cuda.get_device_capability())
        assert reason is None, reason


@pytest.fixture
def gpu() -> None:
    """For what only a GPU can do."""
    if DRY_RUN:
        pytest.skip("a dry run on the CPU")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    kernel = _kernel_of(item)
    if kernel is not None:
        _passed[kernel] += report.when == "call" and report.passed
        _failed[kernel] += report.failed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for kernel, tests in sorted(_collected.items(), key=str):
        if _passed[kernel] or _failed[kernel]:
            terminalreporter.write_line(
                f"{kernel!s:24} {_passed[kernel]:4} of {tests} passed, {_failed[kernel]} failed"
            )


def pytest_sessionfinish(session: pytest.Session) -> None:
    ran = any(_passed.values()) or any(_failed.values())
    # A part of a file says nothing about a kernel.
    if not ran or any("::" in argument for argument in session.config.args):
        return
    has_run_on_gpu = DEVICE == "cuda"
    record = {
        "device": torch.cuda.get_device_name() if has_run_on_gpu else "dry run",
        "capability": list(torch.cuda.get_device_capability()) if has_run_on_gpu else None,
        "torch": torch.__version__,
        "source": None if cuda_library.BUILD is None else cuda_library.BUILD.source,
        "kernels": [
            {
                "dtype": str(kernel.dtype).removeprefix("torch."),
                "head_dims": [kernel.d_qk, kernel.d_v],
                "tests": tests,
                "passed": _passed[kernel],
                "failed": _failed[kernel],
            }
            for kernel, tests in _collected.items()
        ],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
