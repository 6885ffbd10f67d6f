import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl.visibility import (
    VisibilityError,
    causal_visible_end,
    check_visible_end,
    dense_mask,
    num_visible_pairs,
)


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
