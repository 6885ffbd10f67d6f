"""Whose function does the work of one of transformers': its own, in PyTorch, or a package's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

# What closures call the function that they pass their arguments on to: transformers' decorator
# `use_kernel_func_from_hub_with_fallback`, and the modules that the package kernels makes of it.
_PASSED_ON_TO = ("implementation", "func")


def implementation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that does the work of `function` of a modeling file.

    transformers takes a package's where one is installed (flash-linear-attention, mamba-ssm), and
    with ``use_kernels=True`` a module of the Hub, as it may at any time.
    """
    while True:
        if isinstance(function, nn.Module):
            function = function.forward
        if not inspect.isroutine(function) or inspect.isbuiltin(function):
            return function
        names = inspect.getclosurevars(function).nonlocals
        inner = next((names[name] for name in _PASSED_ON_TO if callable(names.get(name))), None)
        if inner is None:
            return function
        function = inner


def is_of_transformers(function: Callable[..., Any]) -> bool:
    """Whether a function of a modeling file runs as it is written there, in PyTorch."""
    module = getattr(implementation(function), "__module__", None)
    return module is not None and module.startswith("transformers.models.")
