import pytest
import torch
from hypothesis import given

from onepass_trl import OnePassCollator, Pass, build_tree, linearize
from onepass_trl.data.layout import TOKEN_COLUMNS
from onepass_trl.visibility import check_visible_end
from tests.data.strategies import pass_lists

ROWS = [
    linearize(build_tree([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])])),
    linearize(build_tree([Pass([6, 7], [0, 1])])),
]


@given(pass_lists(), pass_lists())
def test_padding_and_flattening_keep_every_row(first, second):
    rows = [linearize(build_tree(first)), linearize(build_tree(second))]
    padded = OnePassCollator(pad_token_id=9, pad_to_multiple_of=4)(rows)
    for index, row in enumerate(rows):
        check_visible_end(padded["visible_end"][index].numpy())
        for name in TOKEN_COLUMNS:
            assert padded[name][index, : len(row)].tolist() == getattr(row, name).tolist()
        padding = padded["shift_labels"][index, len(row) :]
        assert (padding == -100).all()
        assert padded["weights"][index, len(row) :].sum() == 0
    assert padded["input_ids"].shape[1] % 4 == 0

    flat = OnePassCollator(padding_free=True)(rows)
    check_visible_end(flat["visible_end"][0].numpy())
    assert flat["input_ids"].tolist() == [[*rows[0].input_ids, *rows[1].input_ids]]
    assert flat["num_turns"].tolist() == [[len(first), len(second)]]
    assert flat["row_lengths"].tolist() == [[len(row) for row in rows]]
    assert padded["row_lengths"].tolist() == [[len(row)] for row in rows]


def test_rows_of_a_dataset_give_the_same_batch():
    as_dicts = [
        {
            **{name: getattr(row, name).tolist() for name in TOKEN_COLUMNS},
            "num_turns": row.num_turns,
        }
        for row in ROWS
    ]
    for name, tensor in OnePassCollator()(ROWS).items():
        assert torch.equal(OnePassCollator()(as_dicts)[name], tensor)


def test_padding_sees_and_is_seen_by_padding_only():
    batch = OnePassCollator(pad_token_id=3)(ROWS)
    assert batch["input_ids"][1].tolist() == [6, 7, 3, 3, 3, 3]
    assert batch["visible_end"][1].tolist() == [2, 2, 6, 6, 6, 6]


def test_padding_goes_in_runs():
    ends = OnePassCollator(pad_to_multiple_of=150)(ROWS[1:2])["visible_end"][0]
    assert ends.tolist() == [2] * 2 + [66] * 64 + [130] * 64 + [150] * 20


def test_padding_needs_a_positive_multiple():
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, or None, got -8"):
        OnePassCollator(pad_to_multiple_of=-8)


def test_rows_of_another_collator_are_an_error():
    with pytest.raises(
        ValueError, match=r"missing: position_ids, shift_labels.*got: input_ids, labels"
    ):
        OnePassCollator()([{"input_ids": [1], "labels": [1]}])
