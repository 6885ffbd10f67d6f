"""The build of the CUDA library: its options, what it makes, and that torch can load it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onepass_trl.attention import cuda_library
from onepass_trl.attention.cuda_library import CudaBuild, read_build
from onepass_trl.attention.implementations import cpu

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import check_build  # noqa: E402
import cuda_build  # noqa: E402

# What a CUDA build of torch has and a CPU build lacks, never called here.
STUB = """
int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }
void torch_c10_cuda_check_msg(int error, const char* file, const char* function, int line,
                              int check, char** message) {}
void torch_c10_cuda_free_error_msg(char* message) {}
"""
OPS = ("tree_plan", "tree_attention", "tree_attention_backward")


@pytest.fixture
def nvcc(tmp_path) -> dict[str, str]:
    """An environment in which there are an nvcc, which nobody calls, and headers of CuTe."""
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    (tmp_path / "include" / "cute" / "arch").mkdir(parents=True)
    (tmp_path / "include" / "cute" / "arch" / "mma_sm90_gmma.hpp").touch()
    return {"PATH": str(tmp_path), "CUTLASS_PATH": str(tmp_path)}


def test_options_without_variables(nvcc, tmp_path):
    options = cuda_build.options_of(nvcc)
    assert options.nvcc == str(tmp_path / "nvcc")
    assert options.archs == ("80", "86", "89", "90a")
    assert options.cute == str(tmp_path / "include")
    assert options.head_dims == cuda_library.HEAD_DIMS
    assert cuda_build.options_of({"PATH": ""}) is None


def test_variables_trim_the_build(nvcc):
    variables = {"ONEPASS_CUDA_ARCHS": "90a 80+PTX", "ONEPASS_HEAD_DIMS": "64;192/128,64"}
    options = cuda_build.options_of({**nvcc, **variables})
    assert options.archs == ("90a", "80+PTX")
    assert options.head_dims == ((64, 64), (192, 128))
    assert cuda_build.options_of({**nvcc, "ONEPASS_CUDA": "0"}) is None


def test_cuda_home_comes_before_the_path(nvcc, tmp_path):
    (tmp_path / "home" / "bin").mkdir(parents=True)
    inside = shutil.copy(tmp_path / "nvcc", tmp_path / "home" / "bin" / "nvcc")
    assert cuda_build.options_of({**nvcc, "CUDA_HOME": str(tmp_path / "home")}).nvcc == str(inside)


def test_without_cute_only_the_hopper_kernels_are_missing(nvcc, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    del nvcc["CUTLASS_PATH"]
    with pytest.raises(SystemExit, match="pip install --no-deps nvidia-cutlass"):
        cuda_build.options_of({**nvcc, "ONEPASS_CUDA": "1"})
    assert cuda_build.options_of(nvcc) is None
    assert "leaving the CUDA library out: the Hopper kernels need" in capsys.readouterr().out
    assert cuda_build.options_of({**nvcc, "ONEPASS_CUDA_ARCHS": "80"}).cute is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ONEPASS_CUDA": "yes"}, "ONEPASS_CUDA is 'yes', expected 0 or 1"),
        ({"ONEPASS_CUDA": "1", "PATH": ""}, "there is no nvcc: put the CUDA toolkit's bin"),
        ({"ONEPASS_CUDA_ARCHS": "sm_80"}, "ONEPASS_CUDA_ARCHS has 'sm_80', expected entries as in"),
        ({"ONEPASS_HEAD_DIMS": "64x64"}, "ONEPASS_HEAD_DIMS has '64x64'"),
        ({"ONEPASS_HEAD_DIMS": "80"}, "ONEPASS_HEAD_DIMS has 80/80, expected multiples of 32"),
        ({"ONEPASS_HEAD_DIMS": "64/128"}, "d_v at most d_qk"),
        ({"ONEPASS_HEAD_DIMS": "288"}, "from 32 to 256"),
    ],
)
def test_variables_that_cannot_be_understood(nvcc, variables, message):
    with pytest.raises(SystemExit, match=message):
        cuda_build.options_of({**nvcc, **variables})


REPORT = """
ptxas info    : Compiling entry function '_ZN7onepass4cuda4sm8012delta_kernelI6__halfEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN7onepass4cuda4sm8012delta_kernelI6__halfEEvi
    8 bytes stack frame, {} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
"""  # noqa: E501


def test_spills_are_found_in_the_report_of_ptxas(tmp_path):
    (tmp_path / "build.ninja").write_text(f"build {tmp_path}/a.o: cuda a.cu\n")
    (tmp_path / "a.o.log").write_text(REPORT.format(12))
    (tmp_path / "of_another_build.o.log").write_text(REPORT.format(99))
    kernels = check_build.read_kernels(tmp_path)
    assert kernels == [("sm80::delta_kernel<__half>", "sm_80", 255, 16)]
    assert list(check_build.spill_errors(kernels)) == [
        "sm80::delta_kernel<__half> for sm_80 spills 16 bytes"
    ]


def test_hopper_kernels_start_with_the_registers_that_they_share_out():
    names = ["sm90::dq_kernel<__half, 64, 64>", "sm90::dk_dv_kernel<__half, 64, 64, (Want)0>"]
    kernels = [
        check_build.Kernel(names[0], "sm_90a", 168, 0),
        check_build.Kernel(names[1], "sm_90a", 152, 0),
        check_build.Kernel("statistics_kernel<__half>", "sm_90a", 34, 0),
        check_build.Kernel("sm90::round_dq_kernel<__half, 64>", "sm_90a", 43, 0),
    ]
    assert list(check_build.register_errors(kernels)) == [
        f"{names[1]} has 152 registers, expected 168"
    ]
    config = (cuda_build.HERE / "sm90" / "config.h").read_text()
    assert f"kRegisters = {check_build.HOPPER_REGISTERS};" in config


def test_missing_instructions_are_found(tmp_path, monkeypatch):
    complete = " HMMA.16816.F32.BF16 R4 LDSM.16.M88.4 R8 LDGSTS.E.BYPASS.128 "
    code = {
        ("sm80::dq_kernel<__half, 64, 64>", "sm_80"): complete,
        ("sm80::forward_kernel<__half, 64, 64>", "sm_80"): complete.replace("LDSM", "LDS"),
        ("sm80::delta_kernel<__half>", "sm_80"): "",
        ("range_kernel", "sm_90"): "",
    }
    monkeypatch.setattr(check_build, "_machine_code", lambda folder: code)
    assert list(check_build.instruction_errors(tmp_path)) == [
        "sm80::forward_kernel<__half, 64, 64> for sm_80 has no LDSM",
        "no kernel for sm_90 matches 'sm80::(forward|dq|dk_dv|dq_dk_dv)_kernel'",
    ]


def test_only_some_head_sizes_have_a_kernel_that_adds_up_dq(tmp_path, monkeypatch):
    complete = (
        " HMMA.16816 LDSM LDGSTS HGMMA.64x64x16.F32 R8, gdesc[UR4].tnspA.tnspB UTMALDG.4D WARPGROUP"
        " USETMAXREG.TRY_ALLOC USETMAXREG.DEALLOC STSM.16.M88.4 LDG.E.STRONG.GPU MEMBAR.ALL.GPU "
    )
    names = ["sm80::dq_kernel<__half, 256, 256>", "sm90::dq_kernel<__half, 256, 256>"]
    code = {(name, "sm_90a"): complete for name in names}
    monkeypatch.setattr(check_build, "_machine_code", lambda folder: code)
    assert list(check_build.instruction_errors(tmp_path)) == []
    for family, instruction in (("sm80", "RED.E.ADD.F32"), ("sm90", "UBLKRED.G.S.ADD.F32")):
        name = f"{family}::dq_dk_dv_kernel<__half, 64>"
        code[name, "sm_90a"] = f"{complete} {instruction} "
        assert list(check_build.instruction_errors(tmp_path)) == []
        code[name, "sm_90a"] = f"{complete} {instruction.replace('ADD', 'MAX')} "
        (found,) = check_build.instruction_errors(tmp_path)
        assert found.startswith(f"{name} for sm_90a has no {instruction[:3]}")
        del code[name, "sm_90a"]


@pytest.mark.parametrize(("meanwhile", "errors"), [(128, 0), (127, 1)])
def test_exponentials_after_the_wait_are_found(tmp_path, monkeypatch, meanwhile, errors):
    body = "HGMMA gsb0 DEPBAR.LE gsb0, 0x1 {} DEPBAR.LE gsb0, 0x0 {} HGMMA"
    code = {
        ("sm90::forward_kernel<__half, 192, 128>", "sm_90a"): body.format(
            "MUFU.EX2 R1, R1 " * meanwhile, "MUFU.EX2 R1, R1 " * (128 - meanwhile)
        ),
        ("sm80::forward_kernel<__half, 192, 128>", "sm_90a"): "",
    }
    monkeypatch.setattr(check_build, "_machine_code", lambda folder: code)
    assert len(list(check_build.overlap_errors(tmp_path))) == errors


def test_nothing_is_checked_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {"PATH": ""})
    check_build.main()
    assert capsys.readouterr().out == "check-cuda: skipped, there is no nvcc (or ONEPASS_CUDA=0)\n"


def test_symbols_of_the_unstable_interface_are_found(tmp_path):
    (tmp_path / "a.cpp").write_text(
        "namespace c10 { void unstable(int); }\n"
        'extern "C" void aoti_torch_stable();\n'
        "void f() { c10::unstable(1); aoti_torch_stable(); }\n"
    )
    library = tmp_path / "a.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "a.cpp", "-o", library], check=True)
    assert list(check_build.symbol_errors(library)) == [
        "a.so needs c10::unstable, which torch may change"
    ]


def test_the_library_for_cpus_needs_nothing_of_torch_that_may_change():
    assert list(check_build.symbol_errors(cpu.PATH)) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The library for one architecture and head size."""
    environment = {**os.environ, "ONEPASS_CUDA_ARCHS": "80", "ONEPASS_HEAD_DIMS": "64"}
    options = cuda_build.options_of(environment)
    if options is None:
        pytest.skip("there is no nvcc (or ONEPASS_CUDA=0)")
    folder = tmp_path_factory.mktemp("cuda")
    cuda_build.build(options, folder / "objects", folder / "_cuda.so")
    return folder / "_cuda.so"


@pytest.mark.long("csrc", "tests/cuda")
def test_what_was_built_is_recorded_next_to_the_library(built):
    build = read_build(built)
    assert build == CudaBuild(build.nvcc, ("80",), ((64, 64),), cuda_build.source_digest())
    assert build.nvcc[0].isdigit()


@pytest.mark.long("csrc", "tests/cuda")
def test_kernels_are_as_they_should_be(built):
    objects = built.parent / "objects"
    kernels = check_build.read_kernels(objects)
    assert {kernel.arch for kernel in kernels} == {"sm_80"}
    assert {"sm80::forward_kernel<__half, 64, 64>", "range_kernel"} <= {k.name for k in kernels}
    assert list(check_build.spill_errors(kernels)) == []
    assert list(check_build.instruction_errors(objects)) == []
    assert list(check_build.symbol_errors(built)) == []


LOADING = """
import ctypes, sys
import torch
ctypes.CDLL(sys.argv[2])
from onepass_trl.attention import ops
torch.ops.load_library(sys.argv[1])
for name in sys.argv[3:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"onepass::{name}", "CUDA"), name

keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
def message(op, *arguments):
    # The CUDA implementation, called with what is on no GPU: its checks answer.
    try:
        op.default.redispatch(keys, *arguments)
    except RuntimeError as error:
        return str(error)
ops = torch.ops.onepass
ends = torch.full((1, 6), 6, dtype=torch.int32)
q, lse = torch.zeros(1, 2, 6, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 6)
options = None, None, 1.0, 0, 0.0, None
for text in (
    message(ops.tree_plan, ends[0], None, 0),
    message(ops.tree_plan, ends.long(), None, 0),
    message(ops.tree_plan, ends, None, 0),
    message(ops.tree_attention, q[0], q, q, ends, *options),
    message(ops.tree_attention, q, q[:, :, :5], q, ends, *options),
    message(ops.tree_attention, q, q.float(), q, ends, *options),
    message(ops.tree_attention_backward, q, None, q, q, q, q, lse, ends, *options),
):
    function, line, what = text.splitlines()[0].split(", ", 2)
    print(what)
"""


@pytest.mark.long("csrc", "tests/cuda")
def test_torch_loads_it_and_its_checks_answer(built, tmp_path):
    """On a CPU, with stand-ins for the few functions that only a CUDA build of torch has."""
    if cuda_library.torch_has_cuda():
        stub = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    else:
        (tmp_path / "stub.c").write_text(STUB)
        stub = tmp_path / "libtorch_cuda.so"
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname=libtorch_cuda.so", "stub.c", "-o", stub]
        subprocess.run(command, cwd=tmp_path, check=True)
    run = subprocess.run(
        [sys.executable, "-c", LOADING, built, stub, *OPS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "visible_end has 1 dimensions",
        "visible_end is Long (1, 6), expected Int (1, 6)",
        "visible_end is on another device",
        "q, k and v have 3, 4 and 4 dimensions",
        "k is BFloat16 (1, 2, 5, 64), expected BFloat16 (1, 2, 6, 64)",
        "k is Float (1, 2, 6, 64), expected BFloat16 (1, 2, 6, 64)",
        "k is on another device",
    ]


def test_a_family_that_is_none_is_an_error():
    program = (
        "from tests.cuda import emulation\n"
        "emulation.library().onepass_forward(9, True, 64, 64, None)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "ONEPASS_CUDA_FAMILY": "sm_80"},
        capture_output=True,
        text=True,
    )
    assert "ONEPASS_CUDA_FAMILY is 'sm_80', expected sm80, sm90" in run.stderr


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("80",), (8, 6), True),
        (("86",), (8, 0), False),
        (("80",), (9, 0), False),
        (("90a",), (9, 0), True),
        (("100",), (10, 3), True),
        (("100a",), (10, 3), False),
        (("80+PTX",), (12, 1), True),
        (("86+PTX",), (8, 0), False),
        (("90a", "80+PTX"), (11, 0), True),
    ],
)
def test_where_an_architecture_runs(archs, capability, runs):
    assert CudaBuild("13.0", archs, ((64, 64),), "").runs_on(capability) == runs


@pytest.fixture
def library(monkeypatch) -> CudaBuild:
    """A library that could be loaded, in a torch with CUDA."""
    build = CudaBuild("13.0", ("80",), ((64, 64),), "digest")
    monkeypatch.setattr(cuda_library, "BUILD", build)
    monkeypatch.setattr(cuda_library, "LOAD_ERROR", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return build


def test_remedies_keep_what_is_built(library):
    assert cuda_library.missing((8, 6)) is None
    assert "ONEPASS_CUDA_ARCHS='80;90a' make cuda" in cuda_library.missing((9, 0))
    assert "ONEPASS_CUDA_ARCHS='80;120' make cuda" in cuda_library.missing((12, 0))
    assert "need compute capability 8.0 and the device has 75" in cuda_library.missing((7, 5))


FACTS = {"nvcc": "13.0", "archs": ["80"], "head_dims": [[64, 64]], "source": "digest"}


@pytest.mark.parametrize(
    "facts",
    [None, "", json.dumps(FACTS)[:30], "[]", json.dumps({**FACTS, "head_dims": [64]})]
    + [json.dumps({k: v for k, v in FACTS.items() if k != name}) for name in FACTS],
    ids=str,
)
def test_a_library_that_does_not_say_what_it_is_is_not_loaded(tmp_path, facts):
    (tmp_path / "_cuda.so").touch()
    if facts is not None:
        (tmp_path / "_cuda.json").write_text(facts)
    with pytest.raises(OSError, match=r"_cuda\.json doesn't say what it is built for"):
        read_build(tmp_path / "_cuda.so")


def test_records_of_other_sources_do_not_count(library, tmp_path, monkeypatch):
    entry = [[8, 0], "bfloat16", [64, 64]]
    record = tmp_path / "validated.json"
    monkeypatch.setattr(cuda_library, "VALIDATED", record)
    for source, counts in (("digest", True), ("another", False), (None, False)):
        record.write_text(json.dumps({"source": source, "kernels": [entry]}))
        assert cuda_library.is_validated((8, 0), torch.bfloat16, (64, 64)) == counts
        assert not cuda_library.is_validated((8, 0), torch.float16, (64, 64))
        assert not cuda_library.is_validated((9, 0), torch.bfloat16, (64, 64))


def test_the_digest_is_of_the_sources_of_the_library(tmp_path, monkeypatch):
    before = cuda_build.source_digest()
    csrc = shutil.copytree(cuda_build.HERE.parent, tmp_path / "csrc")
    monkeypatch.setattr(cuda_build, "HERE", csrc / "cuda")
    assert cuda_build.source_digest() == before
    for path in ("cpu/gemm.h", "cuda/check_build.py"):
        (csrc / path).write_text("other")
        assert cuda_build.source_digest() == before
    for path in ("scoring.h", "cuda/api.cpp", "cuda/sm90/forward.cuh", "cuda/plan.cu"):
        (csrc / path).write_text("other")
        assert cuda_build.source_digest() != before
        before = cuda_build.source_digest()


def test_an_interrupted_build_leaves_no_library_in_use(nvcc, tmp_path, monkeypatch):
    """Ninja links outside the package; facts of the library that was there go with it."""
    options = cuda_build.options_of(nvcc)._replace(archs=("80",), head_dims=((64, 64),))
    library, objects = tmp_path / "package" / "_cuda.so", tmp_path / "objects"
    library.parent.mkdir()
    library.write_text("of before")
    library.with_suffix(".json").write_text(json.dumps(FACTS))

    def link(*_, **__):
        (objects / "_cuda.so").write_text("new")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_build, "_nvcc_version", lambda nvcc: "13.0")
    monkeypatch.setattr(cuda_build.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cuda_build.build(options, objects, library)
    assert read_build(library).source == "digest"
    monkeypatch.setattr(cuda_build.subprocess, "run", link)
    with monkeypatch.context() as context:
        context.setattr(cuda_build.shutil, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cuda_build.build(options, objects, library)
    with pytest.raises(OSError, match="doesn't say"):
        read_build(library)
    cuda_build.build(options, objects, library)
    assert library.read_text() == "new"
    assert read_build(library).source == cuda_build.source_digest()
