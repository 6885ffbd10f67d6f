import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onepass_trl.visibility import (
    VisibilityError,
    causal_visible_end,
    check_visible_begin,
    check_visible_end,
    count_tiles,
    coverage,
    cut_into_tiles,
    dense_mask,
    num_executed_pairs,
    num_visible_pairs,
)
from tests.attention.strategies import tilings


def nests(visible_end: list[int]) -> bool:
    """Brute force: every interval [j, end) lies inside each interval that holds its start."""
    return all(
        key < end <= len(visible_end)
        and all(visible_end[inner] <= end for inner in range(key, end))
        for key, end in enumerate(visible_end)
    )


@given(st.lists(st.integers(-1, 8), max_size=7))
def test_check_accepts_exactly_the_trees(ends):
    visible_end = np.array(ends, dtype=np.int32)
    if nests(ends):
        check_visible_end(visible_end)
    else:
        with pytest.raises(VisibilityError, match="visible_end"):
            check_visible_end(visible_end)


def is_in_blocks(visible_begin: list[int], visible_end: list[int]) -> bool:
    """Brute force: from its first token on to a token, all of a block begin and end alike."""
    return all(
        0 <= begin <= key
        and set(visible_begin[begin : key + 1]) == {begin}
        and len(set(visible_end[begin : key + 1])) == 1
        for key, begin in enumerate(visible_begin)
    )


@given(st.data())
def test_check_accepts_exactly_the_blocks(data):
    ends = data.draw(st.lists(st.integers(1, 3), max_size=6))
    begins = data.draw(st.lists(st.integers(-1, 6), min_size=len(ends), max_size=len(ends)))
    arrays = (np.array(x, dtype=np.int32) for x in (begins, ends))
    if is_in_blocks(begins, ends):
        check_visible_begin(*arrays)
    else:
        with pytest.raises(VisibilityError, match=r"visible_(begin|end)\[\d\] is"):
            check_visible_begin(*arrays)


def test_blocks_see_themselves_in_both_directions():
    ends, begins = (np.array(x, dtype=np.int32) for x in ([5, 5, 5, 4, 5], [0, 1, 1, 3, 4]))
    assert dense_mask(ends, visible_begin=begins).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    positions = np.array([0, 1, 2, 3, 3], dtype=np.int32)
    assert dense_mask(ends, positions, 1, begins).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    with pytest.raises(VisibilityError, match=r"shape \(4,\), expected \(5,\)"):
        check_visible_begin(begins[:4], ends)


def test_a_window_is_measured_in_positions():
    visible_end = np.array([4, 2, 4, 4], dtype=np.int32)
    positions = np.array([0, 1, 1, 2], dtype=np.int32)
    assert dense_mask(visible_end, positions, window=2).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    with pytest.raises(ValueError, match="pass `positions` too"):
        dense_mask(visible_end, window=2)


def test_visible_pairs_of_a_causal_row():
    assert num_visible_pairs(causal_visible_end(5)) == dense_mask(causal_visible_end(5)).sum() == 15


@given(tilings())
@settings(deadline=None)  # a tile per pair takes long on a busy machine
def test_tiles_cover_what_the_dense_mask_has(tiling):
    row, positions, window, begins, sizes = tiling
    seq, (query_tile, key_tile) = row.size, sizes.values()
    mask = dense_mask(row, positions, window, begins)
    queries, keys = (cut_into_tiles(row, positions, size, begins) for size in sizes.values())
    visited, full = coverage(queries, keys, window)
    assert visited.shape == full.shape == (-(-seq // query_tile), -(-seq // key_tile))
    num_skipped = 0
    for (query, key), is_visited in np.ndenumerate(visited):
        tile = mask[query * query_tile :, key * key_tile :][:query_tile, :key_tile]
        if window is None or window > positions.max():
            assert (is_visited, full[query, key]) == (tile.any(), tile.all())
        assert is_visited >= tile.any() >= tile.all() >= full[query, key]
        is_causal = key * key_tile < min((query + 1) * query_tile, seq)
        num_skipped += is_causal and not is_visited
    counts = count_tiles(row, positions, window, begins, **sizes)
    num_visited, num_full = visited.sum(), full.sum()
    assert counts == (num_skipped, num_visited - num_full, num_full)
    executed = num_executed_pairs(row, positions, window, begins, **sizes)
    assert executed == num_visited * query_tile * key_tile
    assert num_visible_pairs(row, positions, window, begins) == mask.sum()


def test_a_window_skips_what_is_far_away_in_a_causal_row():
    row, positions = causal_visible_end(256), np.arange(256, dtype=np.int32)
    assert count_tiles(row, positions, 64) == (3, 7, 0)
    assert count_tiles(row, positions, 128) == (1, 6, 3)
    assert num_executed_pairs(row, positions, 128) == 9 * 64**2
    with pytest.raises(ValueError, match="pass `positions` too"):
        count_tiles(row, window=64)


def test_long_rows_are_counted_in_strips():
    num_tiles = 2500
    counts = count_tiles(causal_visible_end(64 * num_tiles))
    assert counts == (0, num_tiles, num_tiles * (num_tiles - 1) // 2)
