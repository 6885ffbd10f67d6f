"""The levels of trees: what a kernel that takes sequences of any length finds in them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl.attention.branching.levels import Levels, levels_of
from onepass_trl.attention.branching.segments import cut_into_segments
from tests.attention.cases import random_visible_end
from tests.attention.rows import chat_row

CPU = torch.device("cpu")


def as_list(part: slice) -> list[int]:
    return list(range(part.start, part.stop))


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    seq=st.integers(1, 60),
    chunk_size=st.sampled_from([1, 4, 64]),
)
def test_each_segment_runs_after_its_parent_and_on_its_own_tokens(seed, batch, seq, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    rows = np.array([random_visible_end(seq, generator) for _ in range(batch)])
    segments = cut_into_segments(rows)
    levels = Levels(segments, chunk_size, CPU)
    assert levels.num_segments == len(segments.begins)
    cu_seqlens, order = levels.cu_seqlens.tolist(), levels.order.tolist()
    assert cu_seqlens == levels.cu_seqlens_cpu.tolist()
    assert torch.equal(levels.order[levels.place], torch.arange(rows.size))
    runs = [order[a:b] for a, b in itertools.pairwise(cu_seqlens)]
    assert sorted(runs) == [
        list(range(begin, begin + length))
        for begin, length in zip(segments.begins, segments.lengths, strict=True)
    ]
    place = {run[0]: index for index, run in enumerate(runs)}
    chunks = [-(-len(run) // chunk_size) for run in runs]
    done: list[int] = []
    steps = 0
    for level in levels.levels:
        members = as_list(level.segments)
        assert members
        assert level.cu_seqlens.tolist() == cu_seqlens[members[0] : members[-1] + 2]
        assert level.chunk_offsets.tolist() == [sum(chunks[:member]) for member in members]
        parents = (
            {}
            if level.parents is None
            else dict(zip(as_list(level.continuing), level.parents.tolist(), strict=True))
        )
        for member in members:
            before = segments.token_parents[runs[member][0]]
            assert (member in parents) == (before >= 0)
            if before >= 0:
                assert parents[member] in done
                assert runs[parents[member]][-1] == before
        done += members
        steps += max(chunks[member] for member in members)
    assert done == list(range(len(runs)))
    assert len(place) == len(runs)
    assert (levels.num_chunks, levels.num_steps) == (sum(chunks), steps)


def test_a_conversation_takes_a_level_for_each_turn_and_one_for_its_branches():
    levels = levels_of(chat_row(20, 2, 6), 64)
    assert len(levels.levels) <= 21
    sizes = [level.segments.stop - level.segments.start for level in levels.levels]
    assert sizes[:-1] == [1] * len(sizes[:-1])
    assert sizes[-1] >= 20


def test_nothing_in_them_begins_where_a_kernel_would_be_compiled_again():
    levels = levels_of(chat_row(5, 2, 6), 64)
    for level in levels.levels:
        for tensor in (level.cu_seqlens, level.chunk_offsets):
            assert (tensor.data_ptr() - levels.order.data_ptr()) % 16 == 0


def test_layers_share_them():
    visible_end = chat_row(3, 2, 6)
    assert levels_of(visible_end, 64) is levels_of(visible_end, 64)
    assert levels_of(visible_end, 64) is not levels_of(visible_end, 32)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_tokens_are_ordered_and_put_back_with_their_gradients(shape):
    levels = levels_of(chat_row(3, 2, 6), 64)
    tokens = torch.randn(len(levels.order), *shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(levels.ordered(tokens), tokens[levels.order])
    assert torch.equal(levels.in_rows(levels.ordered(tokens)), tokens)
    assert torch.autograd.gradcheck(lambda x: levels.ordered(x) ** 2, tokens)
