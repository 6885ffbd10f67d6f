"""Which layers of transformers branch their state, and how a model's are made to.

A layer that computes with other functions than those replaced would train silently wrong, so a hook
on each checks that they were called.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn
from transformers import Cache

from onepass_trl.attention.branching.convolutions import convolution
from onepass_trl.attention.branching.delta_rule import delta_rule
from onepass_trl.attention.branching.mamba2 import chunk_scan, fused_scan
from onepass_trl.attention.layer_inputs import check_not_required, layer_name

# Layers whose forward mixes tokens by the functions of `REPLACEMENTS` only. Tested, each of them.
MIXERS = (
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
    "KimiLinearDeltaAttention",
    "BailingHybridDeltaAttention",
    "NemotronHMamba2Mixer",
    "GraniteMoeHybridMambaLayer",
    "FalconH1Mixer",
    "BambaMixer",
    "Lfm2ShortConv",
    "Lfm2MoeShortConv",
    "Lfm3ShortConv",
)

_FUSED = "mamba2_split_conv1d_scan_combined"
# Each is called with a function and its name, which wrapped kernels don't have, and returns what
# takes the function's place.
REPLACEMENTS: dict[str, Callable[[Callable[..., Any], str], Callable[..., Any]]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": chunk_scan,
    _FUSED: fused_scan,
}


class _Reached(threading.local):
    """The functions that the layer which is running has called with visible_end."""

    def __init__(self) -> None:
        self.names: set[str] = set()


_reached = _Reached()


def is_mixer(module: nn.Module) -> bool:
    """Whether a module is a layer whose state can branch: of transformers, not of the same name."""
    kind = type(module)
    return kind.__name__ in MIXERS and kind.__module__.startswith("transformers.models.")


def branch_states(model: nn.Module) -> None:
    """Make the layers of `MIXERS` in a model follow `visible_end`. Harmless to repeat."""
    for module in model.modules():
        if not is_mixer(module):
            continue
        names = _replace(sys.modules[type(module).__module__])
        if _check_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_check_inputs, with_kwargs=True)
            module.register_forward_pre_hook(_forget_reached)
            module.register_forward_hook(
                functools.partial(_check_reached, names - {_FUSED}), with_kwargs=True
            )


def _check_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Withhold the mask of padding from a layer that follows `visible_end`, and refuse a cache."""
    if kwargs.get("visible_end") is None:
        check_not_required(module)
        return None
    if kwargs.get("visible_begin") is not None:
        raise ValueError(
            f"{layer_name(module)} got visible_begin, with which a block is seen in both "
            "directions: a layer that carries state along the row can't do that"
        )
    # By its type: its name is "cache", and before transformers 5.24 one of several others.
    if any(isinstance(argument, Cache) for argument in (*args, *kwargs.values())):
        raise ValueError(
            f"{layer_name(module)} got a cache: visible_end describes a whole row, so pass "
            "use_cache=False and no cache with it"
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{layer_name(module)} got {name} and visible_end: pass only visible_end, which "
                "says where packed sequences begin too"
            )
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    batch, seq = hidden_states.shape[:2]
    if (context_parallel := kwargs.get("context_parallel")) is not None:
        seq *= context_parallel.size
    if (shape := tuple(kwargs["visible_end"].shape)) != (batch, seq):
        raise ValueError(
            f"{layer_name(module)}: visible_end has shape {shape}, expected (batch, seq) "
            f"{(batch, seq)}"
        )
    return args, {**kwargs, "attention_mask": None}


def _replace(modeling: ModuleType) -> set[str]:
    """Replace a modeling module's functions, unless that is done, and return their names."""
    names = {name for name in REPLACEMENTS if hasattr(modeling, name)}
    assert names, f"{modeling.__name__} has none of the functions that branch"
    for name in names:
        function = getattr(modeling, name)
        if not hasattr(function, "branches"):
            setattr(modeling, name, _noting(name, REPLACEMENTS[name](function, name)))
    return names


def _noting(name: str, branching: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(branching)
    def noting(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("visible_end") is not None:
            _reached.names.add(name)
        return branching(*args, **kwargs)

    noting.branches = True  # type: ignore[attr-defined]
    return noting


def _forget_reached(*_: Any) -> None:
    _reached.names.clear()


def _check_reached(
    names: set[str], module: nn.Module, _: Any, kwargs: dict[str, Any], __: Any
) -> None:
    """Raise if a layer has computed with other functions: its state would not have branched."""
    missing = sorted(names - _reached.names)
    if kwargs.get("visible_end") is not None and missing:
        raise ValueError(
            f"{layer_name(module)} was given visible_end, but has not called "
            f"{' and '.join(missing)} of its modeling file with it, so its state has not followed "
            "the tree. Load the model without use_kernels=True"
        )
