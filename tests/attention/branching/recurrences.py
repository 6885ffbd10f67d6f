"""The recurrences of hybrid models as they are defined, token by token, in any dtype.

Sequences are ``(tokens, heads, ..)``, and a token's state follows that of the token before it in
its pass, which may be any earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onepass_trl.attention.branching.segments import segments_of
from tests.attention.cases import random_visible_end


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, parents: list[int]
) -> Tensor:
    """Return the outputs of a gated delta rule on normalized keys, ``(tokens, heads, d_v)``."""
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    shared_by = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(shared_by, 1) for x in (q * q.shape[-1] ** -0.5, k))
    decay = (g if g.ndim == 3 else g[..., None]).exp()[..., None]
    states = {-1: v.new_zeros(v.shape[1], k.shape[-1], v.shape[-1])}
    outputs = []
    for token, parent in enumerate(parents):
        state, key = states[parent] * decay[token], k[token][..., None]
        update = (v[token] - (state * key).sum(-2)) * beta[token][:, None]
        states[token] = state + key * update[:, None]
        outputs.append((states[token] * q[token][..., None]).sum(-2))
    return torch.stack(outputs)


def mamba2(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *others: Any, softplus: bool, limit: Any
) -> Tensor:
    """Return the outputs of Mamba 2, ``(tokens, heads, head_dim)``.

    `others` are the sequence z, if there is one, A, D, the bias of dt, and the tokens' parents.
    """
    *gate, A, D, bias, parents = others
    shared_by = x.shape[1] // B.shape[1]
    B, C = (y.repeat_interleave(shared_by, 1) for y in (B, C))
    steps = dt + bias
    steps = (torch.nn.functional.softplus(steps) if softplus else steps).clamp(*limit)
    decay = (steps * A).exp()[..., None, None]
    states = {-1: x.new_zeros(*x.shape[1:], B.shape[-1])}
    outputs = []
    for token, parent in enumerate(parents):
        added = (steps[token][:, None] * x[token])[..., None] * B[token][:, None]
        states[token] = states[parent] * decay[token] + added
        outputs.append((states[token] * C[token][:, None]).sum(-1) + D[:, None] * x[token])
    out = torch.stack(outputs)
    return out * torch.nn.functional.silu(gate[0]) if gate else out


def assert_equals_recurrence(
    visible_end: Tensor,
    actual: Any,
    expected: Any,
    sequences: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> None:
    """Check output and gradients of a rule along a tree against float64, to 1e-5 of their norms.

    Norms below 0.1 count as that: a few tokens can leave less by cancellation.

    Args:
        visible_end: ``(batch, seq)``.
        actual: called with the sequences, ``(batch, seq, ..)``, and the parameters.
        expected: called with the same in float64, ``(batch * seq, ..)``, and the tokens' parents.
        sequences: float32.
        parameters: float32.
    """
    parents = segments_of(visible_end).token_parents.tolist()
    inputs = [x.requires_grad_() for x in (*sequences, *parameters)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out = actual(*inputs)
    flat = [x.flatten(0, 1) for x in doubles[: len(sequences)]]
    reference = expected(*flat, *doubles[len(sequences) :], parents).view_as(out)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    references = torch.autograd.grad((reference * weight).sum(), doubles)
    for at, (a, e) in enumerate(zip((out, *gradients), (reference, *references), strict=True)):
        error = (a - e).norm().item()
        assert error <= 1e-5 * max(e.norm().item(), 0.1), (at, error, e.norm().item())


def random_tree(seq: int, seed: int = 3) -> Tensor:
    """Return `visible_end` of a random tree, ``(1, seq)`` int32."""
    ends = random_visible_end(seq, torch.Generator().manual_seed(seed))
    return torch.from_numpy(np.array([ends], np.int32))
