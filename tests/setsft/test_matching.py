"""Assignments, their cost and their entropy; and the forwards that are planned for the costs."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import Pass, build_tree
from onepass_trl.setsft.matching import (
    assignment_entropy,
    match,
    match_at_random,
    match_in_order,
    plan_costs,
    random_cost,
)
from onepass_trl.setsft.traces import Trace, TraceSet, from_row, to_row

MATRICES = st.integers(1, 5).flatmap(
    lambda k: st.integers(1, k).flatmap(
        lambda m: st.lists(
            st.lists(st.floats(0, 10), min_size=m, max_size=m), min_size=k, max_size=k
        )
    )
)


@given(MATRICES)
def test_the_match_is_the_cheapest_injection(rows):
    costs = np.array(rows)
    num_tokens, num_traces = costs.shape
    tokens = match(costs)
    assert len(set(tokens)) == tokens.size == num_traces
    totals = [
        costs[list(chosen), range(num_traces)].sum()
        for chosen in permutations(range(num_tokens), num_traces)
    ]
    assert costs[tokens, range(num_traces)].sum() == pytest.approx(min(totals))
    assert random_cost(costs) == pytest.approx(np.mean(totals))


def test_random_matches_are_uniform_injections_and_repeatable():
    drawn = [tuple(match_at_random(3, 2, (0, step, 5))) for step in range(1200)]
    assert drawn == [tuple(match_at_random(3, 2, (0, step, 5))) for step in range(1200)]
    counts = [drawn.count(pair) for pair in permutations(range(3), 2)]
    assert sum(counts) == 1200
    assert min(counts) > 150


def test_the_order_of_the_completions_counts_even_if_one_is_missing():
    traces = tuple(Trace(Pass([1, 0, 2], [0, 0, 1]), 1, number) for number in (0, 2, 4, 5))
    assert match_in_order(TraceSet(traces, 0), 8).tolist() == [0, 2, 4, 5]
    assert match_in_order(TraceSet(traces[2:], 0), 4).tolist() == [0, 1]


def test_entropy_is_that_of_the_shares():
    assert assignment_entropy(np.array([3.0, 0.0])) == 0
    assert assignment_entropy(np.full(6, 7.0)) == pytest.approx(np.log(6))


def make_set(num_traces, common=4, question=9, length=10, index=0):
    traces = []
    for number in range(num_traces):
        completion = [*range(100, 100 + common), *range(200 + 50 * number, 200 + 50 * number + 6)]
        ids = [*range(question), 0, *completion]
        traces.append(Trace(Pass(ids, np.arange(len(ids)) > question), question, number))
    return TraceSet(tuple(traces), index)


def test_a_set_is_scored_in_one_row_that_shares_the_question_and_how_traces_begin():
    [forward] = plan_costs([make_set(3)], [7, 8])
    question, per_token = 9, 1 + 4 + 2 + 3 * 6  # two copies of the token at which three traces fork
    assert len(forward.row) == question + 2 * per_token
    assert [at.size for at in forward.targets] == [10] * 6
    assert forward.pairs == [(0, token, trace) for token in range(2) for trace in range(3)]


def test_a_limited_forward_has_no_more_pairs_and_short_traces_fewer_tokens():
    sets = [make_set(3, index=0), make_set(2, index=1)]
    forwards = list(plan_costs(sets, [7, 8], max_pairs=4, num_targets=3))
    assert [len(forward.pairs) for forward in forwards] == [4, 4, 2]
    assert [pair for forward in forwards for pair in forward.pairs] == [
        (number, token, trace)
        for number, set_ in enumerate(sets)
        for token in range(2)
        for trace in range(len(set_.traces))
    ]
    assert all(at.size == 3 for forward in forwards for at in forward.targets)
    assert sum(len(f.row) for f in forwards) < sum(len(f.row) for f in plan_costs(sets, [7, 8]))


@pytest.mark.parametrize("num_targets", [None, 3])
def test_a_forward_has_no_more_tokens_or_a_single_pair(num_targets):
    sets = [make_set(3, common=0, index=0), make_set(2, index=1), make_set(1, question=30, index=2)]
    token_ids = [7, 8, 9]
    [whole] = plan_costs(sets, token_ids, num_targets=num_targets)
    least = max(len(t.after(7, num_targets)) for set_ in sets for t in set_.traces)
    for max_tokens in (1, least, 50, 90, 10_000):
        forwards = list(plan_costs(sets, token_ids, num_targets=num_targets, max_tokens=max_tokens))
        assert [pair for forward in forwards for pair in forward.pairs] == whole.pairs
        for forward in forwards:
            assert len(forward.row) <= max(max_tokens, least)
            assert len(forward.row) <= max_tokens or len(forward.pairs) == 1
            for (number, token, trace), at in zip(forward.pairs, forward.targets, strict=True):
                pass_ = sets[number].traces[trace].after(token_ids[token], num_targets)
                targets = pass_.token_ids[pass_.trained]
                np.testing.assert_array_equal(forward.row.shift_labels[at], targets)
        if max_tokens == 10_000:
            assert len(forwards) == 1
        elif max_tokens == 1:
            assert len(forwards) == len(whole.pairs)
        else:
            assert 1 < len(forwards) < len(whole.pairs)


def test_the_tokens_of_a_matched_row_are_counted():
    for set_ in (make_set(3), make_set(3, common=0), make_set(1)):
        passes = set_.after(range(500, 500 + len(set_.traces)))
        assert set_.num_row_tokens() == build_tree(passes).num_row_tokens()


def test_repeated_traces_share_their_targets_in_the_row():
    set_ = make_set(1)
    twice = TraceSet((set_.traces[0], Trace(set_.traces[0].pass_, set_.traces[0].fork, 1)), 0)
    [once], [both] = plan_costs([set_], [7]), plan_costs([twice], [7])
    assert len(once.row) == len(both.row)
    np.testing.assert_array_equal(*both.targets)


def test_rows_keep_their_sets():
    sets = [make_set(3, index=4), make_set(1, common=2, index=9)]
    for set_, again in zip(sets, from_row(to_row(sets)), strict=True):
        assert again.index == set_.index
        for trace, copy in zip(set_.traces, again.traces, strict=True):
            assert (copy.fork, copy.number) == (trace.fork, trace.number)
            np.testing.assert_array_equal(copy.pass_.token_ids, trace.pass_.token_ids)
            np.testing.assert_array_equal(copy.pass_.trained, trace.pass_.trained)
    with pytest.raises(ValueError, match="lacks the columns trained"):
        from_row({"input_ids": [1]})


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("input_ids", [1, 2], "input_ids has 2 values, expected one for each token .*: 7, the sum"),
        ("trained", [True], "trained has 1 values, expected one for each token of the traces: 7"),
        ("forks", [1], "forks has 1 values, expected one for each trace: 2, the sum of set_sizes"),
        ("forks", [1, 9], r"forks\[1\] is 9, expected .* from 0 to 2"),
        ("forks", [2, 1], r"trace 0 trains the forking token at forks\[0\] = 2"),
        ("set_indices", [0, 1], "set_indices has 2 values, expected one for each set: 1"),
        ("trace_lengths", [8, -1], r"trace_lengths is \[8, -1\], expected positive numbers"),
        ("input_ids", [0.5] * 7, r"input_ids is float64 of shape \(7,\), expected a list of whole"),
    ],
)
def test_columns_that_do_not_belong_together_are_errors(column, value, message):
    traces = (
        Trace(Pass([5, 0, 6, 7], [0, 0, 1, 1]), 1, 0),
        Trace(Pass([5, 0, 8], [0, 0, 1]), 1, 1),
    )
    row = to_row([TraceSet(traces, 0)])
    with pytest.raises(ValueError, match=message):
        from_row({**row, column: value})
