"""Hypothesis draws cases of `tests.attention.cases`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from .cases import Case, Shape, make_case, random_visible_begin, random_visible_end, tree_positions


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
        blocks=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


class Tiling(NamedTuple):
    """A row that is cut into tiles of queries and keys."""

    visible_end: NDArray[np.int32]
    positions: NDArray[np.int32]
    window: int | None
    visible_begin: NDArray[np.int32] | None
    sizes: dict[str, Any]


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    """Random trees of all lengths up to a few tiles, with and without a window and blocks."""
    seq = draw(st.integers(0, 70))
    sizes = {name: draw(st.integers(1, 20)) for name in ("query_tile", "key_tile")}
    window = draw(st.none() | st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ends = torch.tensor([random_visible_end(seq, generator)], dtype=torch.int32)
    begins = None
    if draw(st.booleans()):
        begins = np.array(random_visible_begin(ends[0].tolist(), generator), dtype=np.int32)
    return Tiling(ends[0].numpy(), tree_positions(ends)[0].numpy(), window, begins, sizes)
