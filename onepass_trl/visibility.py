"""The one rule of the package: which query sees which key, from one int per key.

Query ``i`` sees key ``j`` iff ``j <= i < visible_end[j]`` and, in a sliding-window layer,
``positions[i] - positions[j] < window``. Causal attention, packed sequences, padding and prefix
trees are all this rule. ARCHITECTURE.md names its copies, for code that can't call this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class VisibilityError(ValueError):
    """`visible_end` does not describe a prefix tree."""


def causal_visible_end(num_tokens: int) -> NDArray[np.int32]:
    """Return the `visible_end` of plain causal attention, ``(num_tokens,)`` int32.

    >>> causal_visible_end(3)
    array([3, 3, 3], dtype=int32)
    """
    return np.full(num_tokens, num_tokens, dtype=np.int32)


def check_visible_end(visible_end: NDArray[np.int32]) -> None:
    """Raise `VisibilityError` unless the intervals ``[j, visible_end[j])`` hold j and nest.

    Args:
        visible_end: ``(num_tokens,)`` int32.

    >>> check_visible_end(np.array([4, 2, 4, 4], dtype=np.int32))
    >>> check_visible_end(np.array([2, 3, 3], dtype=np.int32))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    onepass_trl.visibility.VisibilityError: visible_end is not a tree: key 1 is visible until 3, ...
    """
    num_tokens = visible_end.size
    index = np.arange(num_tokens)
    outside = (visible_end <= index) | (visible_end > num_tokens)
    if outside.any():
        key = int(outside.argmax())
        raise VisibilityError(
            f"visible_end[{key}] is {visible_end[key]}, expected a value in [{key + 1}, "
            f"{num_tokens}]: every token sees itself and nothing sees beyond the row"
        )
    # Within a run of equal ends the intervals nest by themselves: only the first key of each run
    # can break the tree.
    starts = np.flatnonzero(np.diff(visible_end, prepend=-1))
    open_keys: list[int] = []
    for key in starts.tolist():
        while open_keys and visible_end[open_keys[-1]] <= key:
            open_keys.pop()
        if open_keys and visible_end[key] > visible_end[open_keys[-1]]:
            parent = open_keys[-1]
            raise VisibilityError(
                f"visible_end is not a tree: key {key} is visible until {visible_end[key]}, but it "
                f"stands inside the subtree of key {parent}, which ends at {visible_end[parent]}"
            )
        open_keys.append(key)


def dense_mask(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
) -> NDArray[np.bool_]:
    """Return the ``(num_tokens, num_tokens)`` bool mask, True where query (row) sees key (column).

    O(num_tokens^2): for tests, pictures and explanations only.

    >>> dense_mask(np.array([3, 2, 3], dtype=np.int32)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 0, 1]])
    """
    index = np.arange(visible_end.size)
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < visible_end[None, :])
    if window is not None:
        if positions is None:
            raise ValueError("a window is measured in positions: pass `positions` too")
        mask &= positions[:, None] - positions[None, :] < window
    return mask


def num_visible_pairs(visible_end: NDArray[np.int32]) -> int:
    """Return how many (query, key) pairs a row without a window has: the useful work.

    >>> num_visible_pairs(causal_visible_end(4))
    10
    """
    return int((visible_end.astype(np.int64) - np.arange(visible_end.size)).sum())
