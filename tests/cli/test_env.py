import re

import pytest
import torch

from onepass_trl.attention import cuda_library
from onepass_trl.attention.cuda_library import CudaBuild
from onepass_trl.attention.self_check import decision
from onepass_trl.attention.self_check.verdicts import Verdict
from onepass_trl.cli import main
from onepass_trl.cli.env import _checks
from onepass_trl.versions import TESTED

DEVICES = [("NVIDIA H100", (9, 0)), ("NVIDIA H100", (9, 0)), ("Tesla T4", (7, 5))]


def test_env_prints_versions_and_implementations(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"(tested up to {TESTED['transformers']})" in out
    assert "attention cpu: usable on cpu" in out
    assert re.search(r"^linear attention: (PyTorch|flash-linear-attention) ", out, re.MULTILINE)
    assert re.search(r"^Mamba 2: (PyTorch|mamba-ssm) ", out, re.MULTILINE)
    assert re.search(r"^short convolutions: (PyTorch|causal-conv1d) ", out, re.MULTILINE)
    assert "CUDA kernels" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks all kernels")
def test_without_a_device_nothing_is_checked(capsys):
    assert main(["env", "--check"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "none  any       any      not run: torch sees no CUDA device"


@pytest.fixture
def machine(monkeypatch):
    """A machine with devices, and a library of two head sizes; returns what checks find."""
    build = CudaBuild("13.0", ("90a", "80"), ((64, 64), (32, 32)), "digest")
    monkeypatch.setattr(cuda_library, "BUILD", build)
    monkeypatch.setattr(cuda_library, "LOAD_ERROR", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(DEVICES))
    index = lambda device: device if isinstance(device, int) else device.index  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICES[index(device)][0])
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=0: DEVICES[index(device)][1]
    )
    found = {}

    def verdict_on(device, dtype, head_dims, *, again):
        assert again
        assert device.index == 0
        return found.get((dtype, head_dims), Verdict("passed"))

    monkeypatch.setattr(decision, "verdict_on", verdict_on)
    return found


def test_the_table_has_each_kind_of_device_once(machine):
    rows = list(_checks())
    assert [row[0] for row in rows] == ["NVIDIA H100"] * 14 + ["Tesla T4"]
    assert rows[0] == ("NVIDIA H100", "bfloat16", "64/64", "passed")
    assert rows[1] == ("NVIDIA H100", "bfloat16", "96/96", "not built")
    assert rows[6] == ("NVIDIA H100", "bfloat16", "32/32", "passed")
    assert rows[7][1] == "float16"
    assert rows[-1][3].startswith("not built: the CUDA kernels need compute capability 8.0")


def test_a_wrong_kernel_is_a_difference(machine, monkeypatch, capsys):
    monkeypatch.setattr("onepass_trl.cli.env._facts", lambda: iter([]))
    machine[torch.bfloat16, (64, 64)] = Verdict("not run", "busy")
    assert main(["env", "--check"]) == 0
    machine[torch.float16, (64, 64)] = Verdict("failed", "dk is 0")
    assert main(["env", "--check"]) == 1
    out = capsys.readouterr().out
    assert "NVIDIA H100  bfloat16  64/64    not run: busy\n" in out
    assert "NVIDIA H100  float16   64/64    failed: dk is 0\n" in out
