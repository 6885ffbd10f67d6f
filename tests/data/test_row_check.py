"""Rows that others made: what no tree of passes has is an error that names the row."""

import math

import numpy as np
import pytest
from hypothesis import given

from onepass_trl import OnePassCollator, Pass, build_tree, linearize
from onepass_trl.data.collator import as_layout
from onepass_trl.data.layout import TOKEN_COLUMNS
from onepass_trl.data.row_check import check_rows
from tests.data.strategies import pass_lists

# [1 2 2 4 5 3], visible until [6 2 6 5 5 6]
PASSES = [Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])]

WRONG = {
    "one element": ("weights", [1.0], "1 value of weights and 6 of input_ids"),
    "an element less": ("multiplicity", [1] * 5, "5 values of multiplicity and 6 of input_ids"),
    "no element": ("shift_labels", [], "0 values of shift_labels and 6 of input_ids"),
    "negative id": ("input_ids", {4: -5}, r"input_ids\[4\] = -5, expected a token id"),
    "fractions": ("input_ids", [0.5] * 6, "input_ids of float64, expected int32"),
    "negative target": ("shift_labels", {1: -5}, r"shift_labels\[1\] = -5, expected .* or -100"),
    "huge target": ("shift_labels", {1: 2**40}, r"shift_labels\[1\] = 1099511627776, expected a"),
    "negative weight": ("weights", {1: -1.0}, r"weights\[1\] = -1.0, expected a whole number"),
    "NaN weight": ("weights", {1: math.nan}, r"weights\[1\] = nan, expected a whole number"),
    "infinite weight": ("weights", {1: math.inf}, r"weights\[1\] = inf, expected a whole number"),
    "part of a pass": ("weights", {1: 0.5}, r"weights\[1\] = 0.5, expected a whole number"),
    "no target": ("weights", {0: 1.0}, r"weights\[0\] = 1.0, expected 0, as it has no target"),
    "negative position": ("position_ids", {0: -1}, r"position_ids\[0\] = -1, expected .* to 5"),
    "far position": ("position_ids", {3: 6}, r"position_ids\[3\] = 6, expected .* from 0 to 5"),
    "blind": ("visible_end", {3: 3}, r"visible_end\[3\] = 3, expected a value from 4 to 6"),
    "beyond": ("visible_end", {0: 7}, r"visible_end\[0\] = 7, expected a value from 1 to 6"),
    "crossing": ("visible_end", {2: 4}, "visible_end is not a tree: key 3 is visible until 5"),
    "negative count": ("multiplicity", {0: -1}, r"multiplicity\[0\] = -1, expected how many"),
}


def _row(column=None, change=None):
    row = vars(linearize(build_tree(PASSES)))
    row = {key: value.tolist() if key in TOKEN_COLUMNS else value for key, value in row.items()}
    if isinstance(change, dict):
        change = [change.get(index, value) for index, value in enumerate(row[column])]
    return row if column is None else {**row, column: change}


@given(pass_lists())
def test_rows_of_trees_are_right(passes):
    row = linearize(build_tree(passes))
    columns = {name: np.tile(getattr(row, name), 2) for name in TOKEN_COLUMNS}
    check_rows(columns, dict.fromkeys(columns, np.array([len(row)] * 2)), str)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_collator_names_the_row_of_the_batch(wrong):
    column, change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=f"row 1 of the batch.*{message}"):
        OnePassCollator()([_row(), _row(column, change)])


def test_a_row_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"the row has weights of shape \(1, 6\), expected one"):
        as_layout(_row("weights", [_row()["weights"]]))


@pytest.mark.parametrize("column", ["input_ids", "shift_labels"])
def test_ids_outside_the_vocabulary_are_refused(column):
    collator = OnePassCollator(vocab_size=6)
    assert len(collator([_row()])["input_ids"]) == 1
    with pytest.raises(ValueError, match=f"row 1 of the batch has 6 among its {column}, but the"):
        collator([_row(), _row(column, {1: 6})])
