"""Rows that kernels get wrong first, and inputs of attention for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.reference import visibility_mask

_Node = tuple[int, tuple["_Node", ...]]
"""A number of tokens, and the children that see them."""


class Row(NamedTuple):
    """A row, how many heads attend to it, and a window that is hard for it."""

    name: str
    visible_end: list[int]
    heads: int
    kv_heads: int
    window: int
    copies: int = 1
    """How often the row is repeated, so that a kernel has more blocks than a device runs at once,
    and each copy the results of one."""


class Case(NamedTuple):
    """Inputs of attention, and gradients of what it returns, on a CPU in float64."""

    name: str
    call: Call
    """Of one copy of the row. Floating numbers are those of the dtype to be checked."""
    dout: Tensor
    """``(batch, heads, seq, d_v)``."""
    dlse: Tensor | None
    """``(batch, heads, seq)``; None as in training, where nothing depends on lse."""
    copies: int


def hostile_cases(dtype: torch.dtype, head_dims: tuple[int, int]) -> Iterator[Case]:
    """Yield the cases for one kernel: each row by itself, with one option, and with all of them.

    A second row of the batch is causal, so that the rows of a batch differ.
    """
    for index, row in enumerate(_rows()):
        one = (dict(window=row.window), dict(softcap=2.0), dict(sinks=True))[index % 3]
        for options in ({}, one, dict(window=row.window, softcap=3.0, sinks=True)):
            yield _make_case(row, dtype, head_dims, **options)


def _make_case(
    row: Row,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    seq = len(row.visible_end)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).double()

    def of_heads(heads: int, width: int) -> Tensor:
        return normal(2, seq, heads, width).transpose(1, 2)  # laid out as models do

    d_qk, d_v = head_dims
    visible_end = torch.tensor([row.visible_end, [seq] * seq], dtype=torch.int32)
    call = Call(
        2 * of_heads(row.heads, d_qk),  # so that single keys matter
        of_heads(row.kv_heads, d_qk),
        of_heads(row.kv_heads, d_v),
        visible_end,
        scale=1 / math.sqrt(d_qk),
        positions=None if window is None else _positions(visible_end),
        window=window,
        softcap=softcap,
        sinks=normal(row.heads, dtype=torch.float32) if sinks else None,
    )
    given = dict(window=window, softcap=softcap, sinks=sinks or None)
    named = [f"{name} {value}" for name, value in given.items() if value is not None]
    options = ", ".join(named).replace("sinks True", "sinks")
    dlse = normal(2, row.heads, seq, dtype=torch.float32) if options else None
    name = f"{row.name}, {row.heads}:{row.kv_heads} heads, {options or 'no option'}"
    return Case(name, call, of_heads(row.heads, d_v), dlse, row.copies)


def _positions(visible_end: Tensor) -> Tensor:
    """Return of each token how many others it sees, its index in its pass."""
    return visibility_mask(visible_end).sum(-1, dtype=torch.int32) - 1


def _rows() -> Iterator[Row]:
    leaves = tuple(_leaf(1 + i % 7) for i in range(50))
    fork = (61, (_leaf(64), (64, (_leaf(1), _leaf(2))), _leaf(3)))
    yield Row("one token", [1], 2, 1, 1)
    yield Row("single tokens", _ends(*[_leaf(1)] * 130), 3, 3, 1)
    yield Row("causal", _ends(_leaf(193)), 4, 2, 64)
    yield Row("deep tree", _ends(_chat(40)), 4, 1, 9)
    yield Row("many siblings", _ends((20, leaves)), 6, 2, 22)
    yield Row("long leaf", _ends((3, (_leaf(250), _leaf(2), _leaf(1)))), 2, 2, 70)
    yield Row("branches between tiles", _ends(fork, _leaf(63), _leaf(65)), 4, 2, 65)
    # The collator pads by trees of 64 tokens.
    yield Row("padding", _ends((40, (_leaf(30), _leaf(5))), _leaf(64), _leaf(64)), 3, 1, 30)
    yield Row("packed", _ends((31, ((40, (_leaf(9),)), _leaf(17)))), 8, 2, 40, copies=24)


def _leaf(tokens: int) -> _Node:
    return tokens, ()


def _chat(turns: int) -> _Node:
    """Return a trunk in which each turn has a branch, laid out after the rest of the trunk."""
    node: _Node = _leaf(2)
    for _ in range(turns):
        node = (3, (node, _leaf(2)))
    return node


def _ends(*trees: _Node, begin: int = 0) -> list[int]:
    """Return the `visible_end` of trees one after another, the first of which begins there."""
    ends: list[int] = []
    for tokens, children in trees:
        first = begin + len(ends)
        below = _ends(*children, begin=first + tokens)
        ends += [first + tokens + len(below)] * tokens + below
    return ends
