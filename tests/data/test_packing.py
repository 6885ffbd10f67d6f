from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import Pass, linearize
from onepass_trl.data import limit_passes, pack, split_passes
from onepass_trl.passes import ImageSource, ImageSpan
from tests.conversations import chat_passes
from tests.data.strategies import examples_of_passes, examples_of_row, image_pass_lists, pass_lists


@given(pass_lists(), st.integers(9, 14))
def test_split_trees_fit_and_train_everything_once(passes, max_length):
    rows = [linearize(tree) for tree in split_passes(passes, max_length)]
    assert all(len(row) <= max_length for row in rows)
    assert sum((examples_of_row(row) for row in rows), Counter()) == examples_of_passes(passes)
    assert sum(row.multiplicity.sum() for row in rows) == sum(map(len, passes))
    assert sum(row.num_turns for row in rows) == len(passes)


def test_a_tree_that_fits_is_not_split():
    passes = chat_passes(4, 3, 5, 2)
    whole = 4 * 10 + 3 * 2
    assert len(split_passes(passes, whole)) == 1
    assert len(split_passes(passes, whole - 1)) == 2


def test_splitting_repeats_only_the_path_of_each_branch():
    """Each row holds whole branches; the later rows of a chat need the beginning of its trunk
    only."""
    num_turns, user, reasoning, response = 6, 10, 40, 10
    passes = chat_passes(num_turns, user, reasoning, response)
    rows = [linearize(tree) for tree in split_passes(passes, max_length=200)]
    [whole] = map(linearize, split_passes(passes, max_length=10**6))
    assert sum(row.num_turns for row in rows) == num_turns
    assert max(map(len, rows)) <= 200
    # Depth first, the last turns come first. Each further row begins with the trunk up to the
    # latest of its turns, and repeats nothing else: neither reasoning nor what later turns see.
    latest = [int(row.position_ids.max() + 1 - reasoning) // (user + response) for row in rows]
    assert latest == [6, 5, 3]
    trunk = passes[-1].token_ids[~passes[-1].trained]
    repeated = [trunk[: turn * (user + response) - response] for turn in latest[1:]]
    seen = sum((tokens_of(row) for row in rows), Counter())
    assert seen - tokens_of(whole) == sum((Counter(path.tolist()) for path in repeated), Counter())
    assert sum(map(len, rows)) == len(whole) + sum(map(len, repeated))
    # What is repeated is context: each target is in one of the rows, once.
    assert sum((examples_of_row(row) for row in rows), Counter()) == examples_of_passes(passes)
    trained = sum((targets_of(row) for row in rows), Counter())
    assert set(trained.values()) == {1}
    assert trained.total() == num_turns * (reasoning + response)


def tokens_of(row):
    return Counter(row.input_ids.tolist())


def targets_of(row):
    return Counter(row.shift_labels[row.weights > 0].tolist())


def test_a_pass_that_does_not_fit_cannot_be_split():
    with pytest.raises(ValueError, match="a pass has 4 tokens, more than max_length 3"):
        split_passes([Pass([1, 2, 3, 4], [0, 0, 0, 1])], 3)


LONG = [
    Pass([1, 2, 3, 4], [0, 0, 1, 1]),
    Pass([1, 2], [0, 1]),
    Pass([1, 2, 3, 4, 5], [0, 0, 0, 0, 1]),
]


def test_truncate_keeps_the_start_and_counts_what_is_lost():
    kept, lost = limit_passes(LONG, 3, "truncate")
    assert [pass_.token_ids.tolist() for pass_ in kept] == [[1, 2, 3], [1, 2]]
    assert (lost.num_passes, lost.num_lost_turns, lost.num_lost_tokens, lost.longest) == (
        2,
        1,
        2,
        5,
    )


def test_truncating_cuts_no_image():
    image = ImageSpan(2, 5, ImageSource("a"))
    passes = [Pass([1, 2, 9, 9, 9, 3, 4], [0, 1, 0, 0, 0, 0, 1], [image])]
    for max_length in (3, 4):
        [kept], _ = limit_passes(passes, max_length, "truncate")
        assert kept.token_ids.tolist() == [1, 2]
        assert kept.images == ()
    [kept], lost = limit_passes(passes, 6, "truncate")
    assert kept.images == (image,)
    assert (len(kept), lost.num_lost_tokens) == (6, 1)


@given(image_pass_lists(), st.integers(10, 25))
def test_split_trees_have_whole_images(passes, max_length):
    kept, _ = limit_passes(passes, max_length, "drop")
    trees = split_passes(kept, max_length) if kept else []
    rows = [linearize(tree) for tree in trees]
    assert sum(map(examples_of_row, rows), Counter()) == examples_of_passes(kept)


def test_drop_leaves_whole_turns_out_and_counts_them():
    kept, lost = limit_passes(LONG, 3, "drop")
    assert kept == [LONG[1]]
    assert (lost.num_passes, lost.num_lost_turns, lost.num_lost_tokens, lost.longest) == (
        2,
        2,
        3,
        5,
    )


def test_error_names_the_pass_the_lengths_and_the_remedies():
    with pytest.raises(
        ValueError,
        match=r"pass 0 \(of 3\) has 4 tokens.*max_length is 3; raise max_length to at least 5",
    ):
        limit_passes(LONG, 3, "error")


def test_nothing_is_lost_where_everything_fits():
    kept, lost = limit_passes(LONG, 5, "error")
    assert kept == LONG
    assert (lost.num_passes, lost.num_lost_turns, lost.num_lost_tokens) == (0, 0, 0)


@pytest.mark.parametrize("max_length", [-3, 0, 1])
def test_a_length_within_which_nothing_can_be_trained_is_an_error(max_length):
    for policy in ("truncate", "drop", "error"):
        with pytest.raises(ValueError, match=f"must be at least 2 .*, got {max_length}"):
            limit_passes([Pass([1, 2], [0, 1])], max_length, policy)


def test_an_unknown_policy_is_an_error():
    with pytest.raises(
        ValueError, match="overflow must be one of truncate, error, drop, got 'cut'"
    ):
        limit_passes(LONG, 3, "cut")


@given(st.lists(st.integers(1, 20), max_size=40))
def test_packing_keeps_every_row_and_fills_well(lengths):
    groups = pack(lengths, 20)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    fill = [sum(lengths[index] for index in group) for group in groups]
    assert all(total <= 20 for total in fill)
    assert sum(total <= 10 for total in fill) <= 1  # two half-empty rows would have been one


def test_a_row_longer_than_the_pack_is_an_error():
    with pytest.raises(ValueError, match="a row has 9 tokens, more than max_length 8"):
        pack([3, 9], 8)
