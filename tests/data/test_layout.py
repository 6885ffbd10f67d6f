from collections import Counter

import numpy as np
import pytest
from hypothesis import given

from onepass_trl import Layout, Pass, build_tree, linearize
from onepass_trl.data import concatenate, linearize_with_targets
from onepass_trl.data.layout import images_on, separate, target_paths, trained_ids
from onepass_trl.visibility import check_visible_end, dense_mask
from tests.conversations import chat_passes
from tests.data.strategies import examples_of_passes, examples_of_row, image_pass_lists, pass_lists


@given(pass_lists())
def test_a_row_trains_what_its_passes_train(passes):
    row = linearize(build_tree(passes))
    assert examples_of_row(row) == examples_of_passes(passes)


@given(image_pass_lists())
def test_a_row_trains_what_its_passes_with_images_train(passes):
    """Images with the same tokens are told apart, and each is in the row as a whole."""
    row = linearize(build_tree(passes))
    assert examples_of_row(row) == examples_of_passes(passes)
    assert sum(row.multiplicity[span.begin] for span in row.images) == sum(
        len(pass_.images) for pass_ in passes
    )
    assert len(row.images) == len({span.begin for span in row.images})
    assert Layout.from_columns(row.columns()).images == row.images


@given(image_pass_lists(), image_pass_lists())
def test_images_move_with_their_rows(first, second):
    rows = [linearize(build_tree(passes)) for passes in (first, second)]
    row = concatenate(rows)
    assert examples_of_row(row) == examples_of_passes(first + second)
    whole = [tree.images for row in rows for tree in separate(row)]
    assert [tree.images for tree in separate(row)] == whole


@given(image_pass_lists())
def test_paths_have_the_images_of_their_passes(passes):
    row = linearize(build_tree(passes))
    spans = {pass_.images for pass_ in passes}
    for path, targets in target_paths(row):
        last = targets[-1] + 1  # a pass may go on after its last target
        found = images_on(row, path)
        assert any(found == of_pass[: len(found)] for of_pass in spans)
        assert all(span.end <= last for span in found)


@given(pass_lists())
def test_each_target_is_found_after_its_own_prefix(passes):
    row, positions = linearize_with_targets(passes)
    mask = dense_mask(row.visible_end)
    for pass_, at in zip(passes, positions, strict=True):
        targets = np.flatnonzero(pass_.trained)
        assert at.size == targets.size
        for position, target in zip(at, targets, strict=True):
            assert (row.input_ids[mask[position]] == pass_.token_ids[:target]).all()
            assert row.shift_labels[position] == pass_.token_ids[target]


@given(pass_lists(), pass_lists())
def test_labels_are_the_tokens_that_a_pass_trains(first, second):
    """Counted with what each sees: in the row, and in the passes."""
    row = concatenate([linearize(build_tree(first)), linearize(build_tree(second))])
    labels, mask = trained_ids(row), dense_mask(row.visible_end)
    labelled = Counter(
        (tuple(row.input_ids[mask[index]].tolist()[:-1]), int(labels[index]))
        for index in np.flatnonzero(labels != -100)
    )
    both = (first, second)
    assert labelled == sum((Counter(set(examples_of_passes(passes))) for passes in both), Counter())


@given(pass_lists())
def test_visible_end_is_a_tree_and_counts_add_up(passes):
    row = linearize(build_tree(passes))
    check_visible_end(row.visible_end)
    assert row.multiplicity.sum() == sum(map(len, passes))
    assert row.weights.sum() == sum(pass_.num_trained for pass_ in passes)
    assert ((row.weights > 0) == (row.shift_labels != -100)).all()
    assert row.num_turns == len(passes)


@given(pass_lists(), pass_lists())
def test_concatenated_rows_train_the_same(first, second):
    row = concatenate([linearize(build_tree(first)), linearize(build_tree(second))])
    check_visible_end(row.visible_end)
    assert examples_of_row(row) == examples_of_passes(first + second)


def test_the_trunk_of_a_chat_is_contiguous():
    """h1 r1 h2 r2 h3 t3 r3, then the branches of the earlier turns, the latest first."""
    row = linearize(build_tree(chat_passes(3, user=2, reasoning=2, response=1)))
    trunk_and_last_branch = [0, 1, 4, 5, 6, 9, 10, 11, 12, 13, 14]
    kept = row.multiplicity > 0
    assert row.input_ids[kept].tolist() == [*trunk_and_last_branch, 7, 8, 9, 2, 3, 4]


def test_responses_are_there_twice_and_reasoning_once():
    num_turns, user, reasoning, response = 8, 60, 260, 150
    row = linearize(build_tree(chat_passes(num_turns, user, reasoning, response)))
    assert len(row) == num_turns * (user + reasoning + response) + (num_turns - 1) * response
    assert (
        (row.input_ids[row.multiplicity == 0]).size == 0
    )  # the trunk's next token is context, so no fork copies


def test_a_second_trained_child_gets_a_copy_of_the_last_token_of_its_prefix():
    row = linearize(build_tree([Pass([7, 8, 1], [0, 0, 1]), Pass([7, 8, 2], [0, 0, 1])]))
    assert row.input_ids.tolist() == [7, 8, 8, 1, 2]
    assert row.position_ids.tolist() == [0, 1, 1, 2, 2]
    assert row.visible_end.tolist() == [5, 2, 5, 4, 5]
    assert row.shift_labels.tolist() == [-100, 2, 1, -100, -100]
    assert row.multiplicity.tolist() == [2, 0, 2, 1, 1]


def test_a_token_trained_in_several_passes_weighs_as_many():
    passes = [Pass([1, 2, 3], [0, 1, 1]), Pass([1, 2, 4], [0, 1, 0]), Pass([1, 2, 3], [0, 0, 1])]
    row = linearize(build_tree(passes))
    assert row.shift_labels[0] == 2
    assert row.weights[0] == 2
    assert row.weights[row.shift_labels == 3].tolist() == [2]


def test_a_single_pass_is_an_ordinary_causal_row():
    row = linearize(build_tree([Pass([5, 6, 7, 8], [0, 0, 1, 1])]))
    assert row.input_ids.tolist() == [5, 6, 7, 8]
    assert row.shift_labels.tolist() == [-100, 7, 8, -100]
    assert row.visible_end.tolist() == [4, 4, 4, 4]


def test_a_tree_of_thousands_of_levels_needs_no_recursion():
    ids = np.arange(2400)
    passes = [Pass([*ids[:length], 9999], [0] * length + [1]) for length in range(1, 2400, 2)]
    row = linearize(build_tree(passes))
    assert row.num_turns == len(passes)
    check_visible_end(row.visible_end)


def test_no_passes_is_an_error():
    with pytest.raises(ValueError, match="at least one pass"):
        build_tree([])


@pytest.mark.parametrize(
    ("ids", "trained", "message"),
    [
        ([], [], "at least one token"),
        ([1, 2], [0], "one `trained` flag for each token"),
        ([1, -2], [0, 1], "must not be negative"),
        ([1, 2], [1, 1], "first token of a pass is marked as trained"),
    ],
)
def test_malformed_passes_are_errors(ids, trained, message):
    with pytest.raises(ValueError, match=message):
        Pass(ids, trained)
