"""The compiled copy of `coverage` against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import _C
from onepass_trl.visibility import count_tiles

from .cases import random_visible_end, tree_positions


@given(
    st.integers(0, 70),
    st.integers(1, 20),
    st.integers(1, 20),
    st.none() | st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_the_compiled_plan_counts_the_same_tiles(seq, query_tile, key_tile, window, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([random_visible_end(seq, generator)], dtype=torch.int32)
    [row], [positions] = ends, tree_positions(ends)
    tiles = dict(query_tile=query_tile, key_tile=key_tile)
    expected = count_tiles(row.numpy(), positions.numpy(), window, **tiles)
    assert _C.tile_counts(row, query_tile, key_tile, positions, window or 0) == expected


def test_errors():
    with pytest.raises(
        ValueError, match=r"visible_end has shape \[2, 3\].*expected \(seq,\) int32"
    ):
        _C.tile_counts(torch.zeros(2, 3, dtype=torch.int32), 64, 64)
    with pytest.raises(ValueError, match="tiles of 0 x 64 tokens"):
        _C.tile_counts(torch.ones(1, dtype=torch.int32), 0, 64)
    with pytest.raises(ValueError, match="window is 4 without positions"):
        _C.tile_counts(torch.ones(1, dtype=torch.int32), 64, 64, window=4)
    positions = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"positions has 2 tokens, expected as many as vis.*, 1"):
        _C.tile_counts(torch.ones(1, dtype=torch.int32), 64, 64, positions, 4)
