"""Skips the folder where there is no GPU, and writes after every test what has passed.

The results go to build/test_gpu.json or to the path in ONEPASS_TEST_GPU_RESULTS;
`record_validation.py` reads them. A test that hangs, or after which the device answers no more,
ends the process: the next one goes on with the rest if ONEPASS_TEST_GPU_RESUME is 1.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass_trl.attention import cuda_library

from .device import DEVICE, DRY_RUN, Kernel

HERE = Path(__file__).parent
RESULTS = Path(
    os.environ.get("ONEPASS_TEST_GPU_RESULTS", HERE.parents[1] / "build" / "test_gpu.json")
)
RESUMES = os.environ.get("ONEPASS_TEST_GPU_RESUME") == "1"
# Seconds of a test. A kernel that hangs can't be interrupted, only its process ended.
LIMIT = float(os.environ.get("ONEPASS_TEST_GPU_LIMIT", "300"))
HAS_DEVICE = DRY_RUN or torch.cuda.is_available()
REASON = "torch sees no CUDA device"
DEVICE_LOST = 3  # exit status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        metavar="NAME[,NAME]",
        help="tests/gpu: only the tests of these kernels, such as bfloat16-128-128",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GpuTests(config))


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


class GpuTests:
    """Selects and watches the tests of this folder, and records their outcomes."""

    def __init__(self, config: pytest.Config) -> None:
        kernels = config.getoption("--kernels", default=None)  # unknown if other tests run too
        self._chosen = None if kernels is None else set(kernels.split(","))
        # A part of a file says nothing about a kernel.
        self._writes = HAS_DEVICE and not any("::" in argument for argument in config.args)
        self._collected: Counter[Kernel] = Counter()
        self._kernel_of: dict[str, Kernel] = {}
        """By the tests' names."""
        self._outcomes: dict[str, str] = {}
        """Of every test that has begun: running, passed, failed, skipped, or died with its
        process."""
        self._messages: dict[str, str] = {}
        self._device_lost = False
        self._stderr = os.dup(2)  # during a test, pytest captures what is written there

    @pytest.hookimpl(tryfirst=True)  # before -k and -m leave any out
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        left_out = []
        if RESUMES and RESULTS.exists():
            record = json.loads(RESULTS.read_text())
            self._messages = record["messages"]
            self._outcomes = {
                test: "died" if outcome == "running" else outcome
                for test, outcome in record["outcomes"].items()
            }
        for item in items:
            if HERE not in item.path.parents:
                continue
            # Compilers warn of much that is not ours.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not HAS_DEVICE:
                item.add_marker(pytest.mark.skip(reason=REASON))
            callspec = getattr(item, "callspec", None)
            kernel = None if callspec is None else callspec.params.get("kernel")
            if kernel is not None:
                self._collected[kernel] += 1
                self._kernel_of[item.nodeid] = kernel
            unwanted = self._chosen is not None and str(kernel) not in self._chosen
            if unwanted or item.nodeid in self._outcomes:
                left_out.append(item)
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        if HERE not in item.path.parents:
            return (yield)
        self._outcomes[item.nodeid] = "running"
        self._write()
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=self._stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self._outcomes:
            return
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report.outcome
        if report.failed:
            self._messages[report.nodeid] = report.longreprtext[-2000:]
            self._device_lost = not _device_answers()

    def pytest_runtest_logfinish(self) -> None:
        if self._device_lost:
            pytest.exit("the device answers no more", returncode=DEVICE_LOST)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for kernel, tests in sorted(self._collected.items(), key=str):
            count = self._count(kernel)
            if count["passed"] or count["failed"]:
                terminalreporter.write_line(
                    f"{kernel!s:24} {count['passed']:4} of {tests} passed, {count['failed']} failed"
                )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._write(finished=not self._device_lost)
        if not RESUMES or self._device_lost:
            return
        # The status of all processes that have shared these tests.
        if {"failed", "died"} & set(self._outcomes.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._outcomes:
            session.exitstatus = pytest.ExitCode.OK

    def _count(self, kernel: Kernel) -> dict[str, int]:
        outcomes = Counter(
            outcome
            for test, outcome in self._outcomes.items()
            if self._kernel_of.get(test) == kernel
        )
        return {"passed": outcomes["passed"], "failed": outcomes["failed"] + outcomes["died"]}

    def _write(self, *, finished: bool = False) -> None:
        """Write the results so far; whoever reads them meanwhile finds the old or the new ones."""
        if not self._writes:
            return
        has_run_on_gpu = DEVICE == "cuda"
        record: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if has_run_on_gpu else "dry run",
            "capability": list(torch.cuda.get_device_capability()) if has_run_on_gpu else None,
            "torch": torch.__version__,
            "source": None if cuda_library.BUILD is None else cuda_library.BUILD.source,
            "finished": finished,
            "kernels": [
                {
                    "dtype": str(kernel.dtype).removeprefix("torch."),
                    "head_dims": [kernel.d_qk, kernel.d_v],
                    "tests": tests,
                    **self._count(kernel),
                }
                for kernel, tests in self._collected.items()
            ],
            "outcomes": self._outcomes,
            "messages": self._messages,
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        draft = RESULTS.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        draft.replace(RESULTS)


def _device_answers() -> bool:
    """Return whether a process can go on: after a fault, all that it asks of the device fails."""
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True
