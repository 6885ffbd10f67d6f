"""Whose function does the work of one of transformers'."""

import functools
import inspect
import types

import pytest
import torch

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
