"""Tile counts of the compiled plan against the dense mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import _C
from onepass_trl.visibility import causal_visible_end, dense_mask

from .cases import random_visible_end


@given(st.integers(0, 70), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_counts_are_those_of_the_dense_mask(seq, q_tile, k_tile, seed):
    ends = random_visible_end(seq, torch.Generator().manual_seed(seed))
    mask = dense_mask(np.array(ends, dtype=np.int32))
    skipped = partial = full = 0
    for q in range(0, seq, q_tile):
        for k in range(0, min(q + q_tile, seq), k_tile):
            tile = mask[q : q + q_tile, k : k + k_tile]
            # The plan skips a tile that no query sees; above the diagonal a short tile may hold no
            # causal pair.
            skipped += not tile.any()
            full += bool(tile.all())
            partial += bool(tile.any() and not tile.all())
    assert _C.tile_counts(torch.tensor(ends, dtype=torch.int32), q_tile, k_tile) == (
        skipped,
        partial,
        full,
    )


def test_causal_row():
    assert _C.tile_counts(torch.from_numpy(causal_visible_end(256)), 64, 64) == (0, 4, 6)


def test_errors():
    with pytest.raises(
        ValueError, match=r"visible_end has shape \[2, 3\].*expected \(seq,\) int32"
    ):
        _C.tile_counts(torch.zeros(2, 3, dtype=torch.int32), 64, 64)
    with pytest.raises(ValueError, match="tiles of 0 x 64 tokens"):
        _C.tile_counts(torch.ones(1, dtype=torch.int32), 0, 64)
