"""Chunks of random trees: tokens, predecessors, steps."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl.attention.branching.chunks import chunks_of, cut_into_chunks
from onepass_trl.attention.branching.segments import cut_into_segments
from tests.attention.branching.trees import trees

CPU = torch.device("cpu")


def tokens_before(chunks):
    """Return for each chunk the last token of the chunk before it, -1 for none."""
    last = torch.where(chunks.is_padding, -1, chunks.tokens).amax(1)
    before = torch.full_like(last, -1)
    for earlier, step in chunks.handovers():
        step.hand_on(last[earlier.followed], before[step.own])
    return before.tolist()


@given(trees(), st.integers(1, 9))
def test_chunks_are_pieces_of_passes_step_by_step(visible_end, size):
    segments = cut_into_segments(visible_end.numpy())
    chunks = cut_into_chunks(segments, size, CPU)
    bounds = [0, *(step.own.stop for step in chunks.steps)]
    assert [step.own.start for step in chunks.steps] == bounds[:-1]
    assert bounds[-1] == len(chunks.tokens)
    assert all(step.own.start == step.followed.start for step in chunks.steps)
    seen = []
    for tokens, padding, before in zip(
        chunks.tokens.tolist(), chunks.is_padding.tolist(), tokens_before(chunks), strict=True
    ):
        own = [token for token, is_padding in zip(tokens, padding, strict=True) if not is_padding]
        assert padding == sorted(padding)
        assert tokens[len(own) :] == [own[-1]] * (size - len(own))
        parents = segments.token_parents[own].tolist()
        assert parents == [before, *own[:-1]]
        seen += own
    assert sorted(seen) == list(range(visible_end.numel()))
    depths = (segments.token_parents < 0).astype(int)
    for token, parent in enumerate(segments.token_parents.tolist()):
        depths[token] = depths[parent] + 1 if parent >= 0 else 1
    assert len(chunks.steps) <= depths.max()


@given(trees(), st.integers(1, 9))
def test_what_is_handed_back_is_the_gradient_of_what_is_handed_on(visible_end, size):
    chunks = cut_into_chunks(cut_into_segments(visible_end.numpy()), size, CPU)
    followed = [step.followed.stop - step.followed.start for step in chunks.steps]
    assert followed.pop() == 0
    for (_, following), num in zip(chunks.handovers(), followed, strict=True):
        ends = torch.randn(num, 3, dtype=torch.double)
        starts = ends.new_empty(following.own.stop - following.own.start, 3)
        following.hand_on(ends, starts)
        gradient, back = torch.randn_like(starts), torch.full_like(ends, torch.nan)
        following.hand_back(gradient, back)
        torch.testing.assert_close((ends * back).sum(), (starts * gradient).sum())


@given(trees(), st.integers(1, 9))
def test_rows_are_cut_and_joined(visible_end, size):
    chunks = cut_into_chunks(cut_into_segments(visible_end.numpy()), size, CPU)
    x = torch.randn(*visible_end.shape, 2, dtype=torch.double, requires_grad=True)
    cut = chunks.cut(x)
    assert torch.equal(cut, x.flatten(0, 1)[chunks.tokens])
    assert torch.equal(chunks.join(cut), x)
    weight = torch.randn_like(x)
    (chunks.join(cut * 3) * weight).sum().backward()
    assert torch.equal(x.grad, 3 * weight)


def test_a_step_goes_on_in_the_order_of_the_one_before_unless_it_branches():
    """A trunk of 30 tokens, whose first 10 have a branch of 9 and one of 5, in chunks of 2."""
    ends = np.array([[44] * 10 + [19] * 9 + [24] * 5 + [44] * 20], np.int32)
    chunks = cut_into_chunks(cut_into_segments(ends), 2, CPU)
    sizes = [step.own.stop - step.own.start for step in chunks.steps]
    assert sizes == [1] * 5 + [3] * 3 + [2] * 2 + [1] * 5
    befores = [step.before for step in chunks.steps]
    assert befores.pop(5).tolist() == [0, 0, 0]
    assert befores == [None] * 14


def test_chunks_are_shared_and_no_longer_than_the_longest_segment():
    ends = torch.tensor([[9, 9, 9, 5, 5, 9, 9, 9, 9]], dtype=torch.int32)
    assert chunks_of(ends, 64) is chunks_of(ends, 64)
    assert chunks_of(ends, 64).tokens.shape[1] == 4
    assert chunks_of(ends, 2).tokens.shape[1] == 2
