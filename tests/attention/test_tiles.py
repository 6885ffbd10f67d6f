"""The compiled copy of `coverage` against the definition."""

import pytest
import torch
from hypothesis import given

from onepass_trl import _C
from onepass_trl.visibility import count_tiles

from .strategies import tilings


@given(tilings())
def test_the_compiled_plan_counts_the_same_tiles(tiling):
    row, positions, window, sizes = tiling
    counts = _C.tile_counts(
        torch.from_numpy(row), *sizes.values(), torch.from_numpy(positions), window or 0
    )
    assert counts == count_tiles(row, positions, window, **sizes)


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
