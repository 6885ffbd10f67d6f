"""Random rows of trees and inputs of the op, for the tests of every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onepass_trl.attention import tree_attention


def random_visible_end(seq: int, generator: torch.Generator) -> list[int]:
    """Return the `visible_end` of a random tree: nodes of random length, each with a random share
    of what follows.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    ends: list[int] = [0] * seq
    open_subtrees = [(0, seq)]
    while open_subtrees:
        begin, end = open_subtrees.pop()
        if begin == end:
            continue
        subtree_end = draw(begin + 1, end)
        node_end = draw(begin + 1, subtree_end)
        ends[begin:node_end] = [subtree_end] * (node_end - begin)
        open_subtrees += [(node_end, subtree_end), (subtree_end, end)]
    return ends


def random_visible_begin(visible_end: list[int], generator: torch.Generator) -> list[int]:
    """Return a `visible_begin` with blocks of random length in runs of tokens that end alike."""
    begins: list[int] = []
    for token, end in enumerate(visible_end):
        can_go_on = token > 0 and visible_end[token - 1] == end
        goes_on = can_go_on and bool(torch.rand((), generator=generator) < 0.9)
        begins.append(begins[-1] if goes_on else token)
    return begins


def tree_positions(visible_end: Tensor) -> Tensor:
    """Return each token's number of visible predecessors, `(batch, seq)` int32: its position in its
    own pass.
    """
    index = torch.arange(visible_end.shape[1])
    visible = (index[None, :] < index[:, None]) & (index[:, None] < visible_end[:, None, :])
    return visible.sum(-1, dtype=torch.int32)


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    seq: int = 40
    d_qk: int = 8
    d_v: int = 8


@dataclass
class Case:
    """Inputs of `tree_attention`, float64 leaves rounded to `dtype`, and gradients of its
    outputs.
    """

    inputs: dict[str, Tensor]
    visible_end: Tensor
    options: dict
    dout: Tensor
    dlse: Tensor

    def to(self, device: str) -> Case:
        """Return the same case on a device."""
        return Case(
            {name: x.to(device) for name, x in self.inputs.items()},
            self.visible_end.to(device),
            {
                name: x.to(device) if isinstance(x, Tensor) else x
                for name, x in self.options.items()
            },
            self.dout.to(device),
            self.dlse.to(device),
        )

    def run(self, impl: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return out, lse and the gradients of every input."""
        leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in self.inputs.items()}
        out, lse = tree_attention(
            **leaves, visible_end=self.visible_end, **self.options, impl=impl, return_lse=True
        )
        gradients = torch.autograd.grad(
            [out, lse], list(leaves.values()), [self.dout.to(out.dtype), self.dlse.to(lse.dtype)]
        )
        return {
            "out": out,
            "lse": lse,
            **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)},
        }


def make_case(
    shape: Shape,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    visible_end: Tensor | None = None,
    blocks: bool = False,
) -> Case:
    """Return a case of random trees, or of the given ``(batch, seq)`` rows.

    With `blocks`, runs of their tokens see themselves in both directions.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).double()

    b, n = shape.batch, shape.seq
    if visible_end is None:
        ends = [random_visible_end(n, generator) for _ in range(b)]
        visible_end = torch.tensor(ends, dtype=torch.int32).reshape(b, n)
    assert visible_end.shape == (b, n)
    inputs = {
        "q": normal(b, shape.heads, n, shape.d_qk),
        "k": normal(b, shape.kv_heads, n, shape.d_qk),
        "v": normal(b, shape.kv_heads, n, shape.d_v),
    }
    if sinks:
        inputs["sinks"] = normal(shape.heads)
    options = {"positions": tree_positions(visible_end), "window": window, "softcap": softcap}
    if blocks:
        begins = [random_visible_begin(ends, generator) for ends in visible_end.tolist()]
        options["visible_begin"] = torch.tensor(begins, dtype=torch.int32).reshape(b, n)
    dout, dlse = normal(b, shape.heads, n, shape.d_v), normal(b, shape.heads, n)
    return Case(inputs, visible_end, options, dout, dlse)


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def assert_errs_little_more_than_eager(
    case: Case, actual: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Fail unless each result errs at most twice as much as the dense reference computed in `dtype`
    does, against the dense reference in float64.
    """
    exact, eager = case.run("dense"), case.run("dense", dtype)
    assert set(actual) == set(exact)
    for name, x in actual.items():
        assert x.isfinite().all(), name
        # P and dS are rounded to the dtype before their products, as in every fused kernel; the
        # eager reference keeps them in float32.
        limit = 2 * error(eager[name], exact[name]) + 4 * torch.finfo(dtype).eps
        assert error(x, exact[name]) <= limit, name
