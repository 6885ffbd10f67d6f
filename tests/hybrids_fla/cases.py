"""Inputs of fla's delta rules on trees, and what comes of them by the recurrence in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onepass_trl.attention.branching import fla_rule
from onepass_trl.attention.branching.segments import segments_of
from onepass_trl.attention.head_exchange import ContextParallel

GATED, KIMI = "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"
ARGUMENTS = ("query", "key", "value", "decay", "rate")


def recurrence(query, key, value, decay, rate, parents: list[int]) -> Tensor:
    """Return the outputs for ``(tokens, heads, ..)``, each from the state of the token before it.

    Gated Delta Networks (arXiv 2412.06464), equation 10; with a decay per channel Kimi Linear's
    (arXiv 2510.26692, equation 1).
    """
    repeats = value.shape[1] // query.shape[1]
    query, key = (
        (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(repeats, dim=1)
        for x in (query, key)
    )
    query = query * query.shape[2] ** -0.5
    decay = decay.exp()[..., None] if decay.ndim == 3 else decay.exp()[..., None, None]
    states = {-1: value.new_zeros(value.shape[1], key.shape[2], value.shape[2])}
    for token, parent in enumerate(parents):
        state = states[parent] * decay[token]
        error = value[token] - torch.einsum("hkv,hk->hv", state, key[token])
        error = error * rate[token, :, None]
        states[token] = state + key[token, :, :, None] * error[:, None]
    return torch.stack(
        [torch.einsum("hkv,hk->hv", states[t], query[t]) for t in range(len(parents))]
    )


class Case(NamedTuple):
    """Inputs of a rule on a tree, the gradient of its output, and what comes of them in float64."""

    name: str
    visible_end: Tensor
    leaves: list[Tensor]
    dout: Tensor
    expected: list[Tensor]

    def out(self, *leaves: Tensor, context_parallel: ContextParallel | None = None) -> Tensor:
        """Return what fla gives, called as by a layer of transformers."""
        return fla_rule.along_tree_by_fla(
            fla_rule.usable_backend(),
            self.name,
            self.visible_end,
            leaves,
            context_parallel,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=None,
            position_ids=None,
        )

    def errors(self, out: Tensor, gradients: tuple[Tensor, ...] | None = None) -> dict[str, float]:
        """Return the distance of each result from what it is in float64, relative to its norm."""
        if gradients is None:
            gradients = torch.autograd.grad(out, self.leaves, self.dout)
        results = zip(("out", *ARGUMENTS), (out, *gradients), self.expected, strict=True)
        return {
            name: float((actual.detach().double() - expected).norm() / expected.norm())
            for name, actual, expected in results
        }


def make_case(
    name: str,
    visible_end: Tensor,
    *,
    heads: int = 1,
    value_heads: int | None = None,
    key_dim: int = 16,
    value_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Return a case on the device of `visible_end`, by default with two value heads for each key
    head of a gated rule. Decays are float32, as in models.
    """
    if value_heads is None:
        value_heads = heads if name == KIMI else 2 * heads
    generator = torch.Generator().manual_seed(0)
    shape, device = visible_end.shape, visible_end.device

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*shape, *sizes, generator=generator)

    channels = (key_dim,) if name == KIMI else ()
    leaves = [
        normal(heads, key_dim).to(device, dtype),
        normal(heads, key_dim).to(device, dtype),
        normal(value_heads, value_dim).to(device, dtype),
        -0.2 * normal(value_heads, *channels).abs().to(device),
        normal(value_heads).sigmoid().to(device, dtype),
    ]
    dout = normal(value_heads, value_dim).to(device, dtype)
    exact = [x.double().requires_grad_() for x in leaves]
    parents = segments_of(visible_end).token_parents.tolist()
    out = recurrence(*(x.flatten(0, 1) for x in exact), parents).unflatten(0, shape)
    gradients = torch.autograd.grad(out, exact, dout.double())
    leaves = [x.requires_grad_() for x in leaves]
    return Case(name, visible_end, leaves, dout, [out.detach(), *gradients])
