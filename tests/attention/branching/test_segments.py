"""Segments, their groups and seams of random trees, against the dense mask."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl.attention.branching.convolutions import find_seams
from onepass_trl.attention.branching.recurrences import Groups
from onepass_trl.attention.branching.segments import cut_into_segments
from onepass_trl.visibility import VisibilityError, dense_mask
from tests.attention.cases import random_visible_end

CPU = torch.device("cpu")


@st.composite
def batches(draw):
    seq, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return np.array([random_visible_end(seq, generator) for _ in range(batch)], dtype=np.int32)


def paths(visible_end):
    """Return the tokens of each token's pass up to itself, counted over the batch."""
    return [
        (np.flatnonzero(sees) + row * len(ends)).tolist()
        for row, ends in enumerate(visible_end)
        for sees in dense_mask(ends)
    ]


@given(batches())
def test_segments_are_the_paths(visible_end):
    segments = cut_into_segments(visible_end)
    tokens = [
        list(range(begin, begin + length))
        for begin, length in zip(segments.begins, segments.lengths, strict=True)
    ]
    assert list(chain.from_iterable(tokens)) == list(range(visible_end.size))
    expected = paths(visible_end)
    for segment, own in enumerate(tokens):
        path, above = [], []
        while segment >= 0:
            path[:0] = tokens[segment]
            segment = segments.parents[segment]
            above.append(segment)
        assert path == expected[own[-1]]
        assert segments.levels[tokens.index(own)] == len(above) - 1


@given(batches())
def test_parents_and_tokens_of_groups_come_in_order(visible_end):
    segments = cut_into_segments(visible_end)
    batch = Groups(segments, CPU)
    done: set[int] = set()
    by_group = batch.order.split(batch.sizes)
    for group, flat in zip(batch.groups, by_group, strict=True):
        for at, tokens in enumerate(flat.unflatten(0, (-1, group.length)).tolist()):
            begin = segments.begins[group.segments[at]]
            assert tokens == list(range(begin, begin + segments.lengths[group.segments[at]]))
        parents = segments.parents[list(group.segments)].tolist()
        assert list(group.parents) == [parent for parent in parents if parent >= 0]
        assert done.issuperset(group.parents)
        assert group.has_children == bool(np.isin(segments.parents, group.segments).any())
        done.update(group.segments)
    assert torch.equal(batch.order[batch.place], torch.arange(visible_end.size))


@given(batches(), st.integers(1, 5))
def test_seams_are_the_tokens_with_other_predecessors(visible_end, width):
    seams = find_seams(cut_into_segments(visible_end), width, CPU)
    seq = visible_end.shape[1]
    actual = dict(zip(seams.tokens.tolist(), seams.predecessors.tolist(), strict=True))
    for token, path in enumerate(paths(visible_end)):
        last = [-1] * width + path
        in_row = [
            t if t // seq == token // seq else -1 for t in range(token - width + 1, token + 1)
        ]
        assert (token in actual) == (last[-width:] != in_row)
        if token in actual:
            assert actual[token] == last[-width:]


def test_a_row_without_branches_is_one_segment():
    segments = cut_into_segments(np.full((1, 9), 9))
    assert (segments.begins.tolist(), segments.lengths.tolist()) == ([0], [9])
    assert find_seams(segments, 4, CPU).tokens.numel() == 0


def test_equal_segments_run_as_one_batch():
    """Three branches of two tokens on a trunk of three."""
    segments = cut_into_segments(np.array([[9, 9, 9, 5, 5, 7, 7, 9, 9]]))
    (trunk, branches) = Groups(segments, CPU).groups
    assert trunk == (3, (0,), (), True)
    assert branches == (2, (1, 2, 3), (0, 0, 0), False)


def test_what_is_no_tree_is_an_error():
    with pytest.raises(VisibilityError, match="visible_end"):
        cut_into_segments(np.array([[2, 4, 4, 4]]))
