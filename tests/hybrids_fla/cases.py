"""Inputs of fla's delta rules on trees, and what comes of them by the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass_trl.attention.branching import delta_rule as delta_rules
from onepass_trl.attention.branching import fla_rule
from onepass_trl.attention.branching.segments import segments_of
from onepass_trl.attention.head_exchange import ContextParallel
from tests.attention.branching import recurrences

GATED, KIMI = "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"


class Rule(NamedTuple):
    """A recurrence, by the kernels of a package and as it is defined."""

    sequences: Sequence[str]
    """Of its arguments those per token, ``(batch, seq, ..)``; they come first."""
    parameters: Sequence[str]
    along_tree: Callable[..., Tensor]
    """Called as by a layer of transformers, with `visible_end` and `context_parallel`."""
    plain: Callable[..., Tensor]
    """Called without these, for rows that are one sequence each."""
    recurrence: Callable[..., Tensor]
    """Called with ``(tokens, ..)`` and, last, the token before each."""


class Case(NamedTuple):
    """Inputs of a rule on a tree, the gradient of its output, and what comes of them in float64."""

    rule: Rule
    visible_end: Tensor
    leaves: list[Tensor]
    dout: Tensor
    expected: list[Tensor]

    def out(self, *leaves: Tensor, context_parallel: ContextParallel | None = None) -> Tensor:
        """Return what the kernels give along the tree."""
        return self.rule.along_tree(
            *leaves, visible_end=self.visible_end, context_parallel=context_parallel
        )

    def n_pass(self) -> Tensor:
        """Return what they give, each token from a call for a path of the tree that ends in a leaf.

        Where passes share a token, the output of the first is taken: all give the same.
        """
        parents = segments_of(self.visible_end).token_parents
        with_children = set(parents.tolist())
        num_sequences = len(self.rule.sequences)
        flat = [x.flatten(0, 1) for x in self.leaves[:num_sequences]]
        out: dict[int, Tensor] = {}
        for leaf in range(len(parents)):
            if leaf in with_children:
                continue
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(int(parents[path[-1]]))
            path.reverse()
            one_pass = self.rule.plain(*(x[path][None] for x in flat), *self.leaves[num_sequences:])
            out = dict(zip(path, one_pass[0], strict=True)) | out
        return torch.stack([out[token] for token in range(len(parents))]).view_as(self.dout)

    def errors(self, out: Tensor, gradients: Sequence[Tensor] | None = None) -> dict[str, float]:
        """Return the distance of each result from what it is in float64, relative to its norm."""
        if gradients is None:
            gradients = torch.autograd.grad(out, self.leaves, self.dout)
        names = ("out", *self.rule.sequences, *self.rule.parameters)
        return {
            name: float((actual.detach().double() - expected).norm() / expected.norm())
            for name, actual, expected in zip(names, (out, *gradients), self.expected, strict=True)
        }


def case_of(rule: Rule, visible_end: Tensor, leaves: Sequence[Tensor], dout: Tensor) -> Case:
    """Return the case of inputs on the device of `visible_end`."""
    exact = [x.double().requires_grad_() for x in leaves]
    parents = segments_of(visible_end).token_parents.tolist()
    num_sequences = len(rule.sequences)
    flat = [x.flatten(0, 1) for x in exact[:num_sequences]]
    out = rule.recurrence(*flat, *exact[num_sequences:], parents).unflatten(0, visible_end.shape)
    gradients = torch.autograd.grad(out, exact, dout.double())
    leaves = [x.requires_grad_() for x in leaves]
    return Case(rule, visible_end, leaves, dout, [out.detach(), *gradients])


def delta_rule(name: str) -> Rule:
    """Return a delta rule of fla."""
    backend = fla_rule.usable_backend()
    options = dict(use_qk_l2norm_in_kernel=True)
    branching = delta_rules.delta_rule(backend.RULES[name], name)

    def along_tree(*leaves: Tensor, **tree: Any) -> Tensor:
        out, _ = branching(*leaves, **options, cu_seqlens=None, position_ids=None, **tree)
        return out

    return Rule(
        sequences=("query", "key", "value", "decay", "rate"),
        parameters=(),
        along_tree=along_tree,
        plain=lambda *leaves: backend.RULES[name](*leaves, **options)[0],
        recurrence=recurrences.delta_rule,
    )


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
    device = visible_end.device

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*visible_end.shape, *sizes, generator=generator)

    channels = (key_dim,) if name == KIMI else ()
    leaves = [
        normal(heads, key_dim).to(device, dtype),
        normal(heads, key_dim).to(device, dtype),
        normal(value_heads, value_dim).to(device, dtype),
        -0.2 * normal(value_heads, *channels).abs().to(device),
        normal(value_heads).sigmoid().to(device, dtype),
    ]
    dout = normal(value_heads, value_dim).to(device, dtype)
    return case_of(delta_rule(name), visible_end, leaves, dout)
