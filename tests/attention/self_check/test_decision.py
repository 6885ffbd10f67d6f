"""What "auto" takes for CUDA tensors, on a CPU that says it has a device."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onepass_trl.attention import available_impls, cuda_library
from onepass_trl.attention.cuda_library import CudaBuild
from onepass_trl.attention.implementations import registry
from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.cuda import CUDA
from onepass_trl.attention.self_check import decision
from onepass_trl.attention.self_check.decision import is_proven
from onepass_trl.attention.self_check.verdicts import Verdict

ROOT = Path(__file__).parents[3]
BF16 = torch.bfloat16
ENTRY = [[9, 0], "bfloat16", [64, 64]]


class OnADevice:
    """A tensor that says it is on a CUDA device."""

    device = torch.device("cuda", 0)

    def __init__(self, *shape, dtype=BF16):
        self.shape, self.dtype = shape, dtype


def call(d_qk=64, d_v=64, dtype=BF16, scale=1.0, softcap=None) -> Call:
    q, v = (OnADevice(1, 2, 4, width, dtype=dtype) for width in (d_qk, d_v))
    ends = torch.tensor([[4, 2, 4, 4]], dtype=torch.int32)
    return Call(q, q, v, ends, scale, None, None, softcap, None)


def chosen(**changes) -> str:
    return registry.choose("auto", call(**changes)).name


@pytest.fixture
def checks(monkeypatch, tmp_path) -> SimpleNamespace:
    """A device and a library that no test has seen. `found` is what checks of it will find."""
    library = tmp_path / "_cuda.so"
    library.write_bytes(b"kernels")
    record = tmp_path / "validated.json"
    record.write_text('{"source": null, "kernels": []}')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONEPASS_SELF_CHECK", raising=False)
    build = CudaBuild("13.0", ("90a", "80+PTX"), ((64, 64), (128, 128)), "digest")
    for name, value in dict(BUILD=build, LOAD_ERROR=None, PATH=library, VALIDATED=record).items():
        monkeypatch.setattr(cuda_library, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA H100")
    monkeypatch.setattr(decision, "_driver_version", lambda: "580.1")
    found, ran = [], []

    def check_in_process(device, dtype, head_dims):
        ran.append((device.index, dtype, head_dims))
        return found.pop(0)

    monkeypatch.setattr(decision, "check_in_process", check_in_process)
    for cached in (decision._decide, decision._library_digest):
        cached.cache_clear()
    yield SimpleNamespace(found=found, ran=ran, library=library, record=record)
    for cached in (decision._decide, decision._library_digest):
        cached.cache_clear()


def forget_this_process() -> None:
    decision._decide.cache_clear()
    decision._library_digest.cache_clear()


def test_what_passes_is_taken_and_remembered(checks, caplog):
    caplog.set_level(logging.INFO)
    checks.found += [Verdict("passed")]
    assert [chosen(), chosen()] == ["cuda", "cuda"]
    forget_this_process()
    assert chosen() == "cuda"
    assert checks.ran == [(0, BF16, (64, 64))]
    [line] = caplog.messages
    assert line.startswith(
        "the CUDA kernels for bfloat16 and head sizes 64/64, which no test has run on NVIDIA H100, "
        "have passed a check, in "
    )


def test_every_dtype_and_head_size_has_its_check(checks):
    checks.found += [Verdict("passed"), Verdict("failed", "dk"), Verdict("failed", "dv")]
    taken = [chosen(), chosen(dtype=torch.float16), chosen(d_qk=128, d_v=128), chosen()]
    assert taken == ["cuda", "varlen", "varlen", "cuda"]
    assert checks.ran == [
        (0, BF16, (64, 64)),
        (0, torch.float16, (64, 64)),
        (0, BF16, (128, 128)),
    ]


def test_what_fails_is_left_out_with_what_differed(checks, caplog):
    checks.found += [Verdict("failed", "dk is 0 instead of 1: one token")]
    assert [chosen(), chosen(), chosen(softcap=2.0)] == ["varlen", "varlen", "flex"]
    assert caplog.messages == [
        "the CUDA kernels for bfloat16 and head sizes 64/64 are wrong on NVIDIA H100, so "
        "attention_impl='auto' takes slower ones: dk is 0 instead of 1: one token. Please report "
        "this, with the output of `onepass-trl env --check`"
    ]
    forget_this_process()
    assert chosen() == "varlen"
    assert len(checks.ran) == 1  # remembered
    assert len(caplog.messages) == 2  # and still said


def test_a_check_that_could_not_run_runs_in_the_next_process(checks, caplog):
    checks.found += [Verdict("not run", "out of memory"), Verdict("passed")]
    assert [chosen(), chosen()] == ["varlen", "varlen"]
    [line] = caplog.messages
    assert "couldn't be checked, so attention_impl='auto' takes slower ones: out of memory" in line
    forget_this_process()
    assert chosen() == "cuda"


def test_what_is_validated_needs_no_check(checks):
    checks.record.write_text(json.dumps({"source": "digest", "kernels": [ENTRY]}))
    assert chosen() == "cuda"
    assert checks.ran == []
    checks.record.write_text(json.dumps({"source": "others", "kernels": [ENTRY]}))
    forget_this_process()
    checks.found += [Verdict("failed")]
    assert chosen() == "varlen"


@pytest.mark.parametrize(
    "changes",
    [dict(d_qk=96, d_v=96), dict(dtype=torch.float32), dict(scale=-1.0), dict(d_qk=128)],
    ids=str,
)
def test_what_the_kernels_cannot_run_is_not_checked(checks, changes):
    assert chosen(**changes) in ("varlen", "flex")
    assert checks.ran == []


def test_an_explicit_impl_takes_no_check(checks):
    assert registry.choose("cuda", call()).name == "cuda"
    assert checks.ran == []


def test_another_library_is_checked_again(checks):
    checks.found += [Verdict("failed"), Verdict("passed")]
    assert chosen() == "varlen"
    checks.library.write_bytes(b"mended kernels")
    forget_this_process()
    assert chosen() == "cuda"


def test_a_forced_family_is_checked_by_itself(checks, monkeypatch):
    checks.found += [Verdict("failed"), Verdict("passed")]
    assert chosen() == "varlen"
    monkeypatch.setenv("ONEPASS_CUDA_FAMILY", "sm80")
    forget_this_process()
    assert chosen() == "cuda"


def test_switched_off(checks, monkeypatch, caplog):
    monkeypatch.setenv("ONEPASS_SELF_CHECK", "0")
    assert [chosen(), chosen()] == ["varlen", "varlen"]
    assert checks.ran == []
    [line] = caplog.messages
    assert line.startswith("ONEPASS_SELF_CHECK=0: attention_impl='auto' takes others than the CUDA")
    monkeypatch.setenv("ONEPASS_SELF_CHECK", "no")
    forget_this_process()
    with pytest.raises(ValueError, match="ONEPASS_SELF_CHECK is 'no', expected 0 or 1"):
        chosen()


@pytest.mark.parametrize(
    ("broken", "capability", "message"),
    [
        (dict(LOAD_ERROR=OSError("the file has only 7 of 9 bytes")), (9, 0), "cannot be loaded"),
        (dict(LOAD_ERROR=OSError("undefined symbol: aoti")), (9, 0), "undefined symbol: aoti"),
        (dict(BUILD=None, LOAD_ERROR=OSError("_cuda.json doesn't say")), (9, 0), "_cuda.json"),
        (
            dict(BUILD=CudaBuild("13", ("86",), ((64, 64),), "")),
            (9, 0),
            "the device has 90: rebuild",
        ),
        ({}, (7, 5), None),
    ],
    ids=["half-written", "another torch", "no facts", "other archs", "an old device"],
)
def test_a_library_that_cannot_be_used_is_a_warning(
    checks, monkeypatch, caplog, broken, capability, message
):
    for name, value in broken.items():
        monkeypatch.setattr(cuda_library, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    assert [chosen(), chosen()] == ["varlen" if capability >= (8, 0) else "flex"] * 2
    assert checks.ran == []
    assert len(caplog.messages) == (message is not None)
    assert message is None or message in caplog.text


def test_compiled_code_has_the_answer_in_it(checks):
    """The check runs where the code is traced, not in it."""
    checks.found += [Verdict("passed"), Verdict("failed")]

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        proven = is_proven(0, BF16, (64, 64)), is_proven(0, torch.float16, (64, 64))
        return x + 1 if proven == (True, False) else x

    assert run(torch.zeros(2)).sum() == 2
    assert run(torch.zeros(2)).sum() == 2
    assert len(checks.ran) == 2


def test_the_choice_compiles(checks):
    checks.found += [Verdict("passed"), Verdict("failed")]
    calls = call(), call(dtype=torch.float16)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        return x + 1 if [CUDA.suits(c) for c in calls] == [True, False] else x

    assert run(torch.zeros(2)).sum() == 2
    assert len(checks.ran) == 2


def test_the_status_counts_what_has_passed(checks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    checks.found += [Verdict("passed"), Verdict("failed")]
    chosen(), chosen(dtype=torch.float16)
    checks.record.write_text(
        json.dumps({"source": "digest", "kernels": [[[9, 0], "float16", [128, 128]]]})
    )
    status = next(status for status in available_impls() if status.name == "cuda")
    assert status.devices == ("cuda",)
    assert "2 of 4 pairs of dtype and head size have passed on such a device" in status.detail


def test_the_driver_version(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(decision, "_DRIVER_VERSION", tmp_path / "version")
    assert decision._driver_version() == "580.65.06"
    monkeypatch.setattr(decision, "_DRIVER_VERSION", tmp_path / "nothing")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert decision._driver_version() == "13000"


# No guard: a child that imported its parent's main module would begin from the top.
PROGRAM = """
import sys, torch
print("began", flush=True)
from onepass_trl.attention.self_check import decision
from onepass_trl.attention.self_check.verdicts import Subject
facts = dict(device="a CPU", capability=(0, 0), driver="", torch="", package="", library="")
subject = Subject(**facts, family="", dtype="bfloat16", head_dims=(32, 16))
decision._subject = lambda *_: subject
in_process = decision.check_in_process
def check_in_process(*arguments):
    print("checks", flush=True)
    return in_process(*arguments)
decision.check_in_process = check_in_process
print(decision.verdict_on(torch.device("cpu"), torch.bfloat16, (32, 16)).outcome, flush=True)
"""


def environment(folder: Path) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **threads, "XDG_CACHE_HOME": str(folder)}


def test_two_processes_of_a_launcher_check_once(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    run = subprocess.run(
        [sys.executable, *launcher, script],
        cwd=ROOT,
        env={**environment(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split()) == ["began", "began", "checks", "passed", "passed"]


@pytest.mark.long("onepass_trl/attention/self_check", "tests/attention/self_check")
@pytest.mark.parametrize("way", ["-c", "-"])
def test_any_main_program_can_check(tmp_path, way):
    """As one given on the command line, or typed in as in a notebook."""
    command = [sys.executable, *(["-c", PROGRAM] if way == "-c" else ["-"])]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(tmp_path),
        input=PROGRAM if way == "-" else None,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["began", "checks", "passed"]
