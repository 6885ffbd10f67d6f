"""Ways to compute a layer of the gated delta rule of a chat with flash-linear-attention.

- grouped: one pass, fla called for each group of segments of equal depth and length
- leveled: one pass, fla called once (`attention/branching/levels.py`)
- n_pass: one call for all passes, packed one after another
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

from onepass_trl import Pass
from onepass_trl.attention.branching import delta_rule, fla_rule
from onepass_trl.attention.branching.levels import levels_of
from onepass_trl.attention.branching.recurrences import Groups
from onepass_trl.attention.branching.segments import segments_of
from onepass_trl.data import build_tree, linearize
from onepass_trl.tools.bench.workload import chat_passes

_NAME = "torch_chunk_gated_delta_rule"
_CHUNK = fla_rule.CHUNK_SIZE


class Shape(NamedTuple):
    """Heads of the layer, their size, and where and as what it computes."""

    heads: int
    value_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str


class Way(NamedTuple):
    """The layer's forward, and its chunks that follow one another."""

    forward: Callable[[], Tensor]
    num_tokens: int
    steps: int

    def step(self) -> None:
        """Run forward and backward."""
        out = self.forward()
        out.backward(torch.ones_like(out))


def chat(turns: int, *, tiny: bool = False) -> list[Pass]:
    """Return the passes of a chat, always the same, with reasoning of 170 to 800 tokens."""
    others, reasoning = ((2, 5), (3, 9)) if tiny else ((30, 100), (170, 800))
    return chat_passes(turns, others, reasoning, others, 4096, np.random.default_rng(0))


def ways(passes: list[Pass], shape: Shape) -> dict[str, Way]:
    """Return all ways to compute the passes."""
    visible_end = torch.from_numpy(linearize(build_tree(passes)).visible_end)[None]
    visible_end = visible_end.to(shape.device)
    num_tokens = visible_end.shape[1]
    leveled = delta_rule.delta_rule(chunk_gated_delta_rule, _NAME)
    with patch.object(delta_rule, "usable_backend", lambda: None):
        grouped = delta_rule.delta_rule(chunk_gated_delta_rule, _NAME)
    groups = Groups(segments_of(visible_end), visible_end.device).groups
    grouped_steps = sum(-(-group.length // _CHUNK) for group in groups)
    lengths = [len(pass_) for pass_ in passes]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], device=shape.device)
    in_tree, packed = dict(visible_end=visible_end), dict(cu_seqlens=cu_seqlens)
    steps = levels_of(visible_end, _CHUNK).num_steps
    n_pass_steps = -(-max(lengths) // _CHUNK)
    return {
        "grouped": Way(_layer(grouped, num_tokens, shape, in_tree), num_tokens, grouped_steps),
        "leveled": Way(_layer(leveled, num_tokens, shape, in_tree), num_tokens, steps),
        "n_pass": Way(
            _layer(chunk_gated_delta_rule, sum(lengths), shape, packed), sum(lengths), n_pass_steps
        ),
    }


def _layer(
    rule: Callable[..., Any], num_tokens: int, shape: Shape, options: dict[str, Tensor]
) -> Callable[[], Tensor]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(1, num_tokens, *sizes, device=shape.device, dtype=shape.dtype)

    query, key = (normal(shape.heads, shape.head_dim) for _ in range(2))
    value = normal(shape.value_heads, shape.head_dim)
    decay = -0.1 * normal(shape.value_heads).float().abs()
    leaves = [query, key, value, decay, normal(shape.value_heads).sigmoid()]
    leaves = [x.requires_grad_() for x in leaves]
    return lambda: rule(*leaves, use_qk_l2norm_in_kernel=True, **options)[0]
