"""The one rule of the package: which query sees which key, from one int per key.

Query ``i`` sees key ``j`` iff ``j <= i < visible_end[j]`` and, in a sliding-window layer,
``positions[i] - positions[j] < window``. Causal attention, packed sequences, padding and prefix
trees all follow this rule. ARCHITECTURE.md lists its copies in code that can't call this module.

Rows with blocks that see themselves in both directions, as some models see images, have a second
int per key: ``visible_begin[j] <= i`` takes the place of ``j <= i``. It is the first token of j's
block, and j itself outside of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 64
"""Queries and keys of a tile in the CPU kernels, with which the tools count."""

_STRIP = 1024  # tiles of queries at a time, so that memory is bounded for rows of any length
_NO_POSITIONS = "a window is measured in positions: pass `positions` too"


class VisibilityError(ValueError):
    """`visible_end` does not describe a prefix tree."""


def causal_visible_end(num_tokens: int) -> NDArray[np.int32]:
    """Return the `visible_end` of plain causal attention, ``(num_tokens,)`` int32.

    >>> causal_visible_end(3)
    array([3, 3, 3], dtype=int32)
    """
    return np.full(num_tokens, num_tokens, dtype=np.int32)


def check_visible_end(visible_end: NDArray[np.int32]) -> None:
    """Raise `VisibilityError` unless the intervals ``[j, visible_end[j])`` contain j and nest.

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
                f"is inside the subtree of key {parent}, which ends at {visible_end[parent]}"
            )
        open_keys.append(key)


def check_visible_begin(visible_begin: NDArray[np.int32], visible_end: NDArray[np.int32]) -> None:
    """Raise `VisibilityError` unless each token begins where it is, or in the block before it.

    A block is one unit: what sees one token of it sees all, so these have the same `visible_end`.

    Args:
        visible_begin: ``(num_tokens,)`` int32.
        visible_end: ``(num_tokens,)`` int32, of a tree.

    >>> ends = np.array([4, 4, 4, 4], dtype=np.int32)
    >>> check_visible_begin(np.array([0, 1, 1, 3], dtype=np.int32), ends)
    >>> check_visible_begin(np.array([0, 1, 0, 3], dtype=np.int32), ends)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    onepass_trl.visibility.VisibilityError: visible_begin[2] is 0, expected 2, or 1 as that of ...
    """
    if visible_begin.shape != visible_end.shape:
        raise VisibilityError(
            f"visible_begin has shape {visible_begin.shape}, expected {visible_end.shape} as "
            "visible_end"
        )
    begins_here = visible_begin == np.arange(visible_begin.size)
    goes_on = np.append(False, visible_begin[1:] == visible_begin[:-1])[: visible_begin.size]
    if not (begins_here | goes_on).all():
        key = int((begins_here | goes_on).argmin())
        or_before = f", or {visible_begin[key - 1]} as that of the token before it" if key else ""
        raise VisibilityError(
            f"visible_begin[{key}] is {visible_begin[key]}, expected {key}{or_before}: a block is "
            "a run of tokens that all have its first one"
        )
    cut = ~begins_here & np.append(False, visible_end[1:] != visible_end[:-1])[: visible_end.size]
    if cut.any():
        key = int(cut.argmax())
        raise VisibilityError(
            f"visible_end[{key}] is {visible_end[key]} and visible_end[{key - 1}] is "
            f"{visible_end[key - 1]}, expected the same: both tokens are in the block that begins "
            f"at {visible_begin[key]}, which is seen whole or not at all"
        )


def dense_mask(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
    visible_begin: NDArray[np.int32] | None = None,
) -> NDArray[np.bool_]:
    """Return the ``(num_tokens, num_tokens)`` bool mask, True where query (row) sees key (column).

    O(num_tokens^2): for tests, pictures and explanations only.

    >>> dense_mask(np.array([3, 2, 3], dtype=np.int32)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 0, 1]])
    """
    index = np.arange(visible_end.size)
    begin = index if visible_begin is None else visible_begin
    mask = (begin[None, :] <= index[:, None]) & (index[:, None] < visible_end[None, :])
    if window is not None:
        if positions is None:
            raise ValueError(_NO_POSITIONS)
        position = positions.astype(np.int64)  # no difference of two overflows
        mask &= position[:, None] - position[None, :] < window
    return mask


def num_visible_pairs(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
    visible_begin: NDArray[np.int32] | None = None,
) -> int:
    """Return how many (query, key) pairs see each other: the useful work.

    Args:
        visible_end: ``(num_tokens,)`` int32.
        positions: ``(num_tokens,)`` int32, needed with a window: the token's index in its own pass.
        window: of the layer, None without one.
        visible_begin: ``(num_tokens,)`` int32, None without blocks.

    >>> num_visible_pairs(causal_visible_end(4))
    10
    >>> num_visible_pairs(causal_visible_end(4), np.arange(4, dtype=np.int32), window=2)
    7
    >>> num_visible_pairs(causal_visible_end(4), visible_begin=np.array([0, 1, 1, 3]))
    11
    """
    index = np.arange(visible_end.size)
    # A token of a block is also seen by those before it there, however short the window is.
    in_blocks = 0 if visible_begin is None else int((index - visible_begin).sum())
    if window is None:
        return int((visible_end - index).sum()) + in_blocks
    if positions is None:
        raise ValueError(_NO_POSITIONS)
    return int(np.minimum(positions.astype(np.int64) + 1, window).sum()) + in_blocks


@dataclass(frozen=True, eq=False)
class Tiles:
    """Runs of consecutive tokens and ranges over each: ``(.., num_tiles)``, numpy or torch.

    Attributes:
        first: index of the first token.
        last: index of the last.
        min_end: the least `visible_end`.
        max_end: the largest.
        min_position: the least position; needed with a window, like the next.
        max_position: the largest.
        min_begin: the least `visible_begin`; None, like the next, without blocks.
        max_begin: the largest.
    """

    first: Any
    last: Any
    min_end: Any
    max_end: Any
    min_position: Any = None
    max_position: Any = None
    min_begin: Any = None
    max_begin: Any = None

    def __getitem__(self, index: Any) -> Tiles:
        """Return the tiles of an index, for instance a slice."""
        ranges = (getattr(self, column.name) for column in fields(self))
        return Tiles(*(None if x is None else x[index] for x in ranges))


def cut_into_tiles(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None,
    size: int,
    visible_begin: NDArray[np.int32] | None = None,
) -> Tiles:
    """Return the tiles of `size` tokens of a row, the last of which may be shorter."""
    first = np.arange(0, visible_end.size, size)
    last = np.minimum(first + size, visible_end.size) - 1
    ranges = [
        None if x is None else reduce.reduceat(x, first)
        for x in (visible_end, positions, visible_begin)
        for reduce in (np.minimum, np.maximum)
    ]
    return Tiles(first, last, *ranges)


def coverage(queries: Tiles, keys: Tiles, window: int | None = None) -> tuple[Any, Any]:
    """Return ``(visited, full)``, ``(.., query_tiles, key_tiles)`` bool each: the rule for tiles.

    Attention skips a tile that isn't visited, in which no query sees a key, and needs no mask in a
    full one, in which each query sees every key. Without a window both are exact. With one, a
    visited tile may have no visible pair, and a tile that isn't full may have all.
    """
    q, k = queries[..., :, None], keys[..., None, :]
    min_begin, max_begin = (k.first, k.last) if k.min_begin is None else (k.min_begin, k.max_begin)
    visited = (min_begin <= q.last) & (q.first < k.max_end)
    full = (max_begin <= q.first) & (q.last < k.min_end)
    if window is not None:
        visited &= q.min_position - k.max_position < window
        full &= q.max_position - k.min_position < window
    return visited, full


def count_tiles(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
    visible_begin: NDArray[np.int32] | None = None,
    *,
    query_tile: int = TILE,
    key_tile: int = TILE,
) -> tuple[int, int, int]:
    """Return how many tiles on or below the diagonal are skipped, and how many partial and full.

    With blocks some of these are above the diagonal.

    Args:
        visible_end: ``(num_tokens,)`` int32.
        positions: ``(num_tokens,)`` int32, needed with a window.
        window: of the layer, None without one.
        visible_begin: ``(num_tokens,)`` int32, None without blocks.
        query_tile: number of queries of a tile.
        key_tile: number of keys of a tile.

    >>> count_tiles(causal_visible_end(256))
    (0, 4, 6)
    """
    if window is not None and positions is None:
        raise ValueError(_NO_POSITIONS)
    queries, keys = (
        cut_into_tiles(visible_end, positions, size, visible_begin)
        for size in (query_tile, key_tile)
    )
    num_skipped = num_visited = num_full = 0
    for begin in range(0, queries.first.size, _STRIP):
        strip = queries[begin : begin + _STRIP]
        visited, full = coverage(strip, keys, window)
        num_skipped += int((~visited & (keys.first <= strip.last[:, None])).sum())
        num_visited += int(visited.sum())
        num_full += int(full.sum())
    return num_skipped, num_visited - num_full, num_full


def num_executed_pairs(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
    visible_begin: NDArray[np.int32] | None = None,
    *,
    query_tile: int = TILE,
    key_tile: int = TILE,
) -> int:
    """Return how many pairs are in the tiles that attention visits; arguments of `count_tiles`.

    >>> num_executed_pairs(causal_visible_end(256))  # where 32,896 are useful
    40960
    """
    _, partial, full = count_tiles(
        visible_end, positions, window, visible_begin, query_tile=query_tile, key_tile=key_tile
    )
    return (partial + full) * query_tile * key_tile
