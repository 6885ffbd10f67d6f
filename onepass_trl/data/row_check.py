"""Rows that were made elsewhere: whether their columns are those of a `Layout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.data.layout import TOKEN_COLUMNS
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.visibility import VisibilityError, check_visible_end
from onepass_trl.wording import counted

_LARGEST = np.iinfo(np.int32).max


def check_rows(
    columns: Mapping[str, NDArray[Any]],
    lengths: Mapping[str, NDArray[np.int64]],
    name: Callable[[int], str],
) -> None:
    """Raise ValueError unless rows are what `linearize` could have made.

    Args:
        columns: each of `TOKEN_COLUMNS`, of all rows one after another.
        lengths: how many values each row has in each of these columns, ``(num_rows,)``.
        name: returns what to call a row, given its number.

    >>> column = np.array([0, 1])
    >>> columns = dict.fromkeys(TOKEN_COLUMNS, column)
    >>> check_rows(columns, dict.fromkeys(columns, np.array([2])), "row {}".format)
    Traceback (most recent call last):
    ...
    ValueError: row 0 has visible_end[0] = 0, expected a value from 1 to 2
    """
    sizes = lengths["input_ids"]
    _check_lengths(sizes, lengths, name)
    for column in TOKEN_COLUMNS:
        values = columns[column]
        if values.dtype.kind not in ("iuf" if column == "weights" else "iu"):
            raise ValueError(
                f"{name(0)} has {column} of {values.dtype}, expected "
                f"{'float32' if column == 'weights' else 'int32'}"
            )
    ends = np.cumsum(sizes)
    size = np.repeat(sizes, sizes)
    index = np.arange(size.size) - np.repeat(ends - sizes, sizes)
    ids, positions, labels, weights, visible_end, multiplicity = (
        columns[column] for column in TOKEN_COLUMNS
    )
    has_target = (labels >= 0) & (labels <= _LARGEST)
    for column, right, expected in (
        ("input_ids", (ids >= 0) & (ids <= _LARGEST), "a token id"),
        (
            "position_ids",
            (positions >= 0) & (positions < size),
            "the token's index in its pass, from 0 to {last}",
        ),
        ("shift_labels", has_target | (labels == IGNORE_INDEX), f"a token id or {IGNORE_INDEX}"),
        (
            "weights",
            (weights >= 0) & (weights <= _LARGEST) & (weights == np.floor(weights)),
            "a whole number: of the passes that train the target",
        ),
        ("weights", has_target | (weights == 0), "0, as it has no target"),
        (
            "visible_end",
            (visible_end > index) & (visible_end <= size),
            "a value from {least_end} to {size}",
        ),
        (
            "multiplicity",
            (multiplicity >= 0) & (multiplicity <= _LARGEST),
            "how many passes hold the token",
        ),
    ):
        if right.all():
            continue
        at = int(right.argmin())
        row = int(np.searchsorted(ends, at, side="right"))
        token, length = int(index[at]), int(sizes[row])
        expected = expected.format(last=length - 1, least_end=token + 1, size=length)
        raise ValueError(
            f"{name(row)} has {column}[{token}] = {columns[column][at]}, expected {expected}"
        )
    _check_trees(visible_end, ends, sizes, name)


def _check_lengths(
    sizes: NDArray[np.int64],
    lengths: Mapping[str, NDArray[np.int64]],
    name: Callable[[int], str],
) -> None:
    for column in TOKEN_COLUMNS:
        differs = (lengths[column] != sizes) | (sizes == 0)
        if differs.any():
            row = int(differs.argmax())
            raise ValueError(
                f"{name(row)} has {counted(lengths[column][row], 'value')} of {column} and "
                f"{sizes[row]} of "
                "input_ids, expected one of each for every token, and at least one token"
            )


def _check_trees(
    visible_end: NDArray[Any],
    ends: NDArray[np.int64],
    sizes: NDArray[np.int64],
    name: Callable[[int], str],
) -> None:
    begins = ends - sizes
    try:
        check_visible_end(visible_end + np.repeat(begins, sizes))  # of all rows as one
    except VisibilityError:
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            try:
                check_visible_end(visible_end[begin:end])
            except VisibilityError as error:
                raise ValueError(f"{name(row)}: {error}") from None
        raise
