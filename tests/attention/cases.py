"""Random rows of trees and inputs of the op, for the tests of every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
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
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).double()

    b, n = shape.batch, shape.seq
    ends = [random_visible_end(n, generator) for _ in range(b)]
    visible_end = torch.tensor(ends, dtype=torch.int32).reshape(b, n)
    inputs = {
        "q": normal(b, shape.heads, n, shape.d_qk),
        "k": normal(b, shape.kv_heads, n, shape.d_qk),
        "v": normal(b, shape.kv_heads, n, shape.d_v),
    }
    if sinks:
        inputs["sinks"] = normal(shape.heads)
    options = {"positions": tree_positions(visible_end), "window": window, "softcap": softcap}
    dout, dlse = normal(b, shape.heads, n, shape.d_v), normal(b, shape.heads, n)
    return Case(inputs, visible_end, options, dout, dlse)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every option with every other, and sequence lengths on both sides of the kernels' tiles."""
    kv_heads = draw(st.integers(1, 2))
    shape = Shape(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        seq=draw(st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 129, 200, 331]))),
        d_qk=draw(st.sampled_from([1, 5, 16, 24, 64])),
        d_v=draw(st.sampled_from([1, 7, 16, 40])),
    )
    return make_case(
        shape,
        window=draw(st.one_of(st.none(), st.integers(1, 100))),
        softcap=draw(st.one_of(st.none(), st.sampled_from([1.0, 30.0]))),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
