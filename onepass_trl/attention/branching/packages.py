"""Whose function does the work of one of transformers': its own, in PyTorch, or a package's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Packages whose functions transformers takes where it can import them, by their modules.
FLA, MAMBA, CONVOLUTION = "fla", "mamba_ssm", "causal_conv1d"
NAMES = {
    FLA: "flash-linear-attention",
    MAMBA: "mamba-ssm",
    CONVOLUTION: "causal-conv1d",
}
# What is imported of each; versions before 2 of mamba-ssm have no Mamba 2.
_FUNCTIONS = {FLA: FLA, MAMBA: f"{MAMBA}.ops.triton.ssd_combined", CONVOLUTION: CONVOLUTION}
_INTERPRETED = (FLA, MAMBA)  # by Triton, which needs no GPU then

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


def refusal_on_cpu(function: Callable[..., Any], name: str) -> Callable[[Tensor], None]:
    """Return what raises a ValueError for a tensor on the CPU if `function` has kernels for GPUs.

    They would fail there too, but with messages of drivers.
    """
    package = (getattr(implementation(function), "__module__", None) or "").partition(".")[0]
    if package not in NAMES or (package in _INTERPRETED and runs_in_interpreter()):
        return lambda _: None

    def refuse(x: Tensor) -> None:
        if x.device.type == "cpu":
            raise ValueError(
                f"{name} got tensors on the CPU, and {NAMES[package]}, which is installed, has "
                "kernels for GPUs only: move the model to a GPU, or use an environment without "
                "that package"
            )

    return refuse


def runs_in_interpreter() -> bool:
    """Whether Triton interprets its kernels, for which it needs no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def import_problem(module: str) -> str | None:
    """Return why a package's functions can't be imported, or None; imports them."""
    if importlib.util.find_spec(module) is None:
        return f"{NAMES[module]} is not installed"
    try:
        importlib.import_module(module)
        importlib.import_module(_FUNCTIONS[module])
    # What importing raises where parts of a package don't fit each other or the machine.
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"{NAMES[module]} can't be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _warn_of(module: str, layers: str, install: str) -> None:
    logger.warning(
        "%s is installed, but not used (%s), so %s take longer than need be: install %s",
        NAMES[module],
        import_problem(module) or "transformers has not taken its function",
        layers,
        install,
    )


def warn_if_unused(function: Callable[..., Any], module: str, layers: str, install: str) -> None:
    """Log once why transformers hasn't taken `function`, which its `layers` use, of a package.

    `install` is what has it, for pip. Nothing is logged of a package that isn't installed.
    """
    if is_of_transformers(function) and importlib.util.find_spec(module) is not None:
        _warn_of(module, layers, install)
