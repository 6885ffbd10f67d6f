"""Tile counts of the compiled plan against the dense mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import _C
from onepass_trl.visibility import causal_visible_end, dense_mask

from .cases import random_visible_end, tree_positions


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


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40))
def test_a_window_is_measured_in_positions(seq, q_tile, k_tile, window):
    ends = random_visible_end(seq, torch.Generator().manual_seed(window))
    positions = tree_positions(torch.tensor([ends], dtype=torch.int32))[0]
    mask = dense_mask(np.array(ends, dtype=np.int32))
    mask &= (positions[:, None] - positions[None, :] < window).numpy()
    counts = np.zeros(
        3, dtype=int
    )  # at most skipped, exactly the rest of the triangle, at most full
    for q in range(0, seq, q_tile):
        for k in range(0, min(q + q_tile, seq), k_tile):
            tile = mask[q : q + q_tile, k : k + k_tile]
            counts += [not tile.any(), 1, tile.all()]
    row = torch.tensor(ends, dtype=torch.int32)
    skipped, partial, full = _C.tile_counts(row, q_tile, k_tile, positions, window)
    assert skipped + partial + full == counts[1]
    assert skipped <= counts[0]
    assert full <= counts[2]
    if window > positions.max():
        assert (skipped, partial, full) == _C.tile_counts(row, q_tile, k_tile)


def test_a_window_skips_what_is_far_away_in_a_causal_row():
    row, positions = torch.full((256,), 256, dtype=torch.int32), torch.arange(256).int()
    assert _C.tile_counts(row, 64, 64, positions, 64) == (3, 7, 0)
    assert _C.tile_counts(row, 64, 64, positions, 128) == (1, 6, 3)


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
