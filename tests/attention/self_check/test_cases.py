import numpy as np
import pytest
import torch

from onepass_trl.attention.self_check.cases import hostile_cases
from onepass_trl.visibility import TILE, check_visible_end, count_tiles

DTYPES = (torch.bfloat16, torch.float16)
CASES = list(hostile_cases(torch.bfloat16, (64, 32)))


def test_rows_are_trees_next_to_a_causal_row():
    for case in CASES:
        tree, causal = case.call.visible_end
        check_visible_end(tree.numpy())
        assert (causal == len(tree)).all()


def test_each_row_has_no_option_one_and_all():
    options = [(c.call.window, c.call.softcap, c.call.sinks) for c in CASES]
    given = [sum(value is not None for value in values) for values in options]
    assert given == [0, 1, 3] * 9
    alone = [
        next(i for i, value in enumerate(values) if value is not None) for values in options[1::3]
    ]
    assert {alone.count(i) for i in range(3)} == {3}
    assert len({case.name for case in CASES}) == len(CASES)
    # Training has no gradient through lse, and set fine-tuning has.
    assert {case.dlse is None for case in CASES} == {False, True}


def test_what_the_rows_are_hostile_with():
    """Tiles that are skipped, partial and full; groups of heads; lengths around those of tiles."""
    rows = [case.call.visible_end[0].numpy() for case in CASES]
    skipped, partial, full = np.sum([count_tiles(row) for row in rows], axis=0)
    assert min(skipped, partial, full) > 10
    groups = {case.call.q.shape[1] // case.call.k.shape[1] for case in CASES}
    assert {1, 2, 3, 4} <= groups
    assert {len(row) % TILE for row in rows} >= {0, 1, 2}
    assert max(case.copies * len(row) for case, row in zip(CASES, rows, strict=True)) > 2000


def test_windows_hide_keys_that_the_tree_shows():
    for case in CASES:
        if case.call.window is not None and case.call.q.shape[2] > 1:
            assert (case.call.positions.diff() != 1).any() or case.call.window > 1
            assert int(case.call.positions.max()) >= case.call.window


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_numbers_of_the_dtype(dtype):
    for case in hostile_cases(dtype, (64, 32)):
        for x in (case.call.q, case.call.k, case.call.v, case.dout):
            assert x.dtype == torch.float64
            assert torch.equal(x, x.to(dtype).double())
        assert case.call.k.shape[3] == 64
        assert case.dout.shape[3] == 32
