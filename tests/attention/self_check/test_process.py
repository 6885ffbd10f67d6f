"""A check in a process of its own, of libraries that are right, wrong, hanging and crashing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from onepass_trl.attention.self_check import process
from onepass_trl.attention.self_check.process import check_in_process
from onepass_trl.attention.self_check.verdicts import Verdict

KERNEL = (torch.device("cpu"), torch.bfloat16, (32, 16))


@pytest.fixture
def check(monkeypatch):
    """Return what comes of a program in the place of the check."""

    def run(program: str, time_limit: float = 180) -> Verdict:
        monkeypatch.setattr(process, "_command", lambda: [sys.executable, "-c", program])
        monkeypatch.setattr(process, "TIME_LIMIT", time_limit)
        return check_in_process(*KERNEL)

    return run


def test_the_kernels_for_cpus_pass(monkeypatch, tmp_path):
    """As one of several processes of a launcher that nobody answers, next to files that would be
    taken for modules.
    """
    for name, value in dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="192.0.2.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "torch.py").write_text("raise ImportError('of the working folder')")
    monkeypatch.chdir(tmp_path)
    assert check_in_process(*KERNEL) == Verdict("passed")


WRONG = """
import sys, torch
from onepass_trl.attention.self_check import __main__ as check
right = check.CPU
check.CPU = right._replace(run=lambda call: {wrong})
check.main(sys.argv[1:])
"""


def test_wrong_kernels_fail(check):
    verdict = check(WRONG.format(wrong="right.run(call._replace(window=None))"))
    assert verdict.outcome == "failed"
    assert verdict.detail.startswith("out is ")
    assert "window" in verdict.detail


def test_kernels_that_raise_fail(check):
    verdict = check(WRONG.format(wrong="torch.zeros(2) @ torch.zeros(3)"))
    assert verdict.outcome == "failed"
    assert verdict.detail.startswith("RuntimeError: ")
    assert verdict.detail.endswith(", in: one token, 2:1 heads, no option")


def test_a_crash_fails_in_its_case(check):
    verdict = check(WRONG.format(wrong="__import__('ctypes').string_at(0)"))
    assert verdict == Verdict(
        "failed", "its process crashed (SIGSEGV), in: one token, 2:1 heads, no option"
    )


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "MemoryError"])
def test_a_full_device_says_nothing_about_kernels(check, error):
    raising = f"(_ for _ in ()).throw({error}('out of memory'))"
    verdict = check(WRONG.format(wrong=raising))
    assert verdict == Verdict("not run", f"{error.removeprefix('torch.')}: out of memory")


CASE = "print('self-check: case one token', flush=True)\n"


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        (
            CASE + "import os; os.abort()",
            Verdict("failed", "its process crashed (SIGABRT), in: one token"),
        ),
        ("import os; os.abort()", Verdict("not run", "its process crashed (SIGABRT)")),
        (
            CASE + "import os; os.kill(os.getpid(), 9)",
            Verdict("not run", "its process crashed (SIGKILL)"),
        ),
        (
            "raise ImportError('no such library')",
            Verdict("not run", "its process ended with status 1: ImportError: no such library"),
        ),
        ("pass", Verdict("not run", "its process ended with status 0: no output")),
        (
            CASE + "raise NotImplementedError('op')",
            Verdict(
                "failed",
                "its process ended with status 1: NotImplementedError: op, in: one token",
            ),
        ),
        (
            CASE
            + """print('self-check: verdict ["passed", ""]', flush=True); import os; os.abort()""",
            Verdict("failed", "its process crashed (SIGABRT), in: one token"),
        ),
        (
            """print('x' * 9_999_999); print('self-check: verdict ["passed", ""]\\nmore')""",
            Verdict("passed"),
        ),
    ],
)
def test_what_became_of_the_process(check, program, verdict):
    assert check(program) == verdict


HANGING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({path!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("self-check: case one token", flush=True)
time.sleep(600)
"""


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for a parent to learn of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[-1][0] == "Z"
    except FileNotFoundError:
        return True


def all_end(path: Path) -> bool:
    pids = [int(pid) for pid in path.read_text().split()]
    deadline = time.monotonic() + 30
    while not all(map(has_ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids) == 2 and all(map(has_ended, pids))


def test_what_hangs_is_ended_with_what_it_has_started(check, tmp_path):
    path = tmp_path / "pids"
    verdict = check(HANGING.format(path=str(path)), time_limit=10)
    assert verdict == Verdict("failed", "it took more than 10 seconds, in: one token")
    assert all_end(path)


def test_a_process_that_takes_long_to_begin_says_nothing_about_kernels(check):
    verdict = check("import time; time.sleep(600)", time_limit=0.5)
    assert verdict == Verdict("not run", "it took more than 0 seconds")


def test_an_interrupted_wait_ends_the_process(check, tmp_path):
    path = tmp_path / "pids"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(10)
    try:
        with pytest.raises(KeyboardInterrupt):
            check(HANGING.format(path=str(path)))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert all_end(path)


def test_the_process_ends_by_itself_where_nobody_waits(tmp_path):
    program = WRONG.format(wrong="__import__('time').sleep(600)").replace(
        "check.main", "check.TIME_LIMIT = -4\ncheck.main"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, "cpu", "bfloat16", "32", "16"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert "Timeout (0:00:01)!" in run.stderr


def test_an_interpreter_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    verdict = check_in_process(*KERNEL)
    assert verdict.outcome == "not run"
    assert verdict.detail.startswith("no process can be started: ")


def test_what_the_process_inherits(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,3")
    monkeypatch.setattr(sys, "path", ["", "/a", "/b"])
    environment = process._environment()
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == "MIG-1,3"
    assert environment["PYTHONPATH"] == f"{os.getcwd()}:/a:/b"


def test_the_device_is_the_one_that_the_other_process_means(monkeypatch):
    """Also if it has changed CUDA_VISIBLE_DEVICES since it first looked."""
    from types import SimpleNamespace

    from onepass_trl.attention.self_check.__main__ import _device_of, check

    uuids = ["a", "b", "b"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=uuids[device.index]),
    )
    for uuid, likely, index in (("a", 0, 0), ("b", 2, 2), ("b", 0, 1), ("a", 7, 0)):
        assert _device_of(uuid, torch.device("cuda", likely)).index == index
    verdict = check(torch.device("cuda", 0), torch.bfloat16, (64, 64), "c")
    assert verdict == Verdict(
        "not run", "cuda:0 can't be used: RuntimeError: no device is c, of 3 visible devices"
    )
