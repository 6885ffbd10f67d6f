"""Whose function does the work of one of transformers'."""

import functools
import inspect
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from onepass_trl.attention.branching.convolutions import convolution
from onepass_trl.attention.branching.delta_rule import delta_rule
from onepass_trl.attention.branching.mamba2 import chunk_scan
from onepass_trl.attention.branching.packages import implementation, is_of_transformers
from tests.models import MODELS, make_model


def as_kernels_wraps(func):
    """Return `func` as transformers wraps it where the package kernels is installed."""

    class Func(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Func()


def original(function):
    """Return a modeling file's own function, also where a test has made it branch."""
    while hasattr(function, "branches"):
        function = function.__wrapped__.__wrapped__
    return function


def of_a_package(hidden_states, **_):
    return hidden_states


def falling_back_to(torch_function, implementation):
    """Return what transformers' decorator makes of a function which a package may replace."""

    @functools.wraps(torch_function)
    def wrapped(*args, **kwargs):
        return implementation(*args, **kwargs)

    return wrapped


RULES = {
    "qwen3_5": "torch_chunk_gated_delta_rule",
    "kimi_linear": "chunk_kimi_delta_attention",
    "nemotron_h": "mamba2_chunk_scan",
    "lfm2": "causal_conv1d_fn",
}


@pytest.mark.parametrize("name", [name for name in RULES if name in MODELS])
def test_functions_of_transformers_are_known(name):
    """If this fails, the installed version has another decorator: look there what it calls."""
    layer = type(make_model(name))
    rule = original(getattr(inspect.getmodule(layer), RULES[name]))
    assert implementation(rule).__name__ == RULES[name]
    assert implementation(rule) is not rule
    for function in (rule, as_kernels_wraps(rule)):
        assert is_of_transformers(function)


def test_functions_of_packages_are_known():
    rule = falling_back_to(torch.nn.functional.relu, of_a_package)
    for function in (rule, as_kernels_wraps(rule)):
        assert implementation(function) is of_a_package
        assert not is_of_transformers(function)


def test_a_module_of_the_hub_counts_from_when_it_is_put_in():
    rule = as_kernels_wraps(falling_back_to(of_a_package, torch.nn.functional.relu))
    assert implementation(rule) is torch.nn.functional.relu
    rule.forward = types.MethodType(lambda self, x: of_a_package(x), rule)
    assert implementation(rule).__module__ == __name__


def test_what_is_no_python_function_does_its_own_work():
    assert implementation(torch.exp) is torch.exp
    partial = functools.partial(of_a_package)
    assert implementation(partial) is partial
    assert not is_of_transformers(partial)


TREE = torch.tensor([[4, 4, 3, 4]], dtype=torch.int32)
ON_CPU = {
    "flash-linear-attention": (delta_rule, "fla.ops.gated_delta_rule.chunk", 5),
    "mamba-ssm": (chunk_scan, "mamba_ssm.ops.triton.ssd_combined", 6),
    "causal-conv1d": (convolution, "causal_conv1d.causal_conv1d_interface", 2),
}


@pytest.mark.parametrize("visible_end", [TREE, None])
@pytest.mark.parametrize("package", ON_CPU)
def test_tensors_on_the_cpu_are_refused_before_a_driver_is_asked(package, visible_end):
    branch, module, num_arguments = ON_CPU[package]

    def kernel(*_, **__):
        raise AssertionError("0 active drivers")

    kernel.__module__ = module
    branching = branch(kernel, "rule")
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match=f"rule got tensors on the CPU, and {package}, which is"):
        branching(*[x] * num_arguments, visible_end=visible_end)


UNUSED = {
    "half installed": (
        dict(__init__="import selective_scan_cuda"),
        "mamba-ssm can't be imported: ModuleNotFoundError: No module named 'selective_scan_cuda'",
    ),
    "broken library": (dict(__init__="raise OSError('lib.so: no such file')"), "OSError: lib.so"),
    "too old": (dict(__init__="__version__ = '1.2.2'"), "No module named 'mamba_ssm.ops'"),
}


@pytest.mark.parametrize(("files", "reason"), UNUSED.values(), ids=UNUSED)
def test_a_package_that_is_not_used_is_said_once(install, caplog, files, reason):
    install("mamba_ssm", **files)

    def in_pytorch():
        raise AssertionError("not called")

    in_pytorch.__module__ = "transformers.models.bamba.modeling_bamba"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chunk_scan(in_pytorch, "scan")
    [record] = caplog.records
    assert reason in record.message
    assert record.message.startswith("mamba-ssm is installed, but not used (")
    assert record.message.endswith(
        "layers of Mamba 2 take longer than need be: install mamba-ssm>=2.3"
    )


TYPED = """
import logging, torch
from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.models import make_model

logging.basicConfig()
model = make_model("bamba")
use_onepass_attention(model)
ids = torch.full((1, 4), 5)
model(ids, visible_end=torch.full_like(ids, 4), use_cache=False)
"""


def test_what_is_said_of_packages_that_transformers_finds(tmp_path):
    """In a process of its own: transformers looks for them when a model's file is imported."""
    (tmp_path / "mamba_ssm.py").write_text("import selective_scan_cuda")
    (tmp_path / "causal_conv1d.py").write_text("def causal_conv1d_fn(x, weight): ...")
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", TYPED],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    assert "mamba-ssm is installed, but not used (mamba-ssm can't be imported" in run.stderr
    expected = "ValueError: causal_conv1d_fn got tensors on the CPU, and causal-conv1d, which is"
    assert expected in run.stderr.splitlines()[-1], run.stderr
