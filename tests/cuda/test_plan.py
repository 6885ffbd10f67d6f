"""The plan that the emulated kernels make and the tiles they then visit, by the dense mask."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from onepass_trl.attention.ops import plan_size
from onepass_trl.visibility import count_tiles, dense_mask
from tests.attention.cases import Shape, error, make_case, random_visible_end, tree_positions
from tests.attention.rows import causal_row, chat_row, packed_chats

from . import emulation
from .rows import HALF_SEEN

TILE = 64
SEQS = (1, 3, 63, 64, 65, 129, 700, 2200)
Ints = NDArray[np.int32]


class RowPlan(NamedTuple):
    """The plan of one row, as csrc/cuda/plan.h describes it."""

    ranges: Ints
    query_order: Ints
    query_order_2: Ints
    key_order: Ints
    key_order_2: Ints
    query_begin: Ints
    query_begin_2: Ints
    key_end: Ints
    key_end_2: Ints


def read_plan(plan: Tensor, seq: int) -> RowPlan:
    tiles = -(-seq // TILE)
    pairs = -(-tiles // 2)
    parts = np.split(plan.numpy(), np.cumsum([4 * tiles, *(4 * [tiles, pairs])]))
    assert len(parts.pop()) == 0
    return RowPlan(parts[0].reshape(tiles, 4), *parts[1:])


def tiles_of(x: NDArray, size: int) -> list[NDArray]:
    return [x[begin : begin + size] for begin in range(0, len(x), size)]


def visited_tiles(
    ends: Ints, positions: Ints | None, window: int, queries: int, keys: int = TILE
) -> NDArray[np.bool_]:
    """Return which tiles of `queries` (first index) have to visit which of `keys`: those with a
    pair that the tree lets see each other, but for those that the window rules out as a whole.
    """
    mask = dense_mask(ends)
    visited = np.array(
        [[block.any() for block in tiles_of(part.T, keys)] for part in tiles_of(mask, queries)]
    )
    if window:
        nearest = np.array([part.min() for part in tiles_of(positions, queries)])
        furthest = np.array([part.max() for part in tiles_of(positions, keys)])
        visited &= nearest[:, None] - furthest[None, :] < window
    return visited


def longest_first(counts: NDArray) -> list[int]:
    return sorted(range(len(counts)), key=lambda index: (-counts[index], index))


def random_rows(batch: int, seq: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([random_visible_end(seq, generator) for _ in range(batch)]).int()
    return ends, tree_positions(ends)


@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("seq", SEQS)
def test_plan_is_that_of_the_dense_mask(seq, window):
    ends, positions = random_rows(3, seq, seed=seq)
    plans = emulation.make_plan(ends, positions if window else None, window)
    assert plans.shape[1] == plan_size(seq)
    for row, row_ends, row_positions in zip(plans, ends.numpy(), positions.numpy(), strict=True):
        plan = read_plan(row, seq)
        seen = row_positions if window else np.zeros_like(row_positions)
        for values, least, most in ((row_ends, 0, 1), (seen, 2, 3)):
            parts = tiles_of(values, TILE)
            assert plan.ranges[:, least].tolist() == [part.min() for part in parts]
            assert plan.ranges[:, most].tolist() == [part.max() for part in parts]
        single = visited_tiles(row_ends, row_positions, window, TILE)
        pairs = visited_tiles(row_ends, row_positions, window, 2 * TILE)
        assert plan.query_order.tolist() == longest_first(single.sum(1))
        assert plan.query_order_2.tolist() == longest_first(pairs.sum(1))
        assert plan.key_order.tolist() == longest_first(single.sum(0))
        assert plan.query_begin.tolist() == single.argmax(1).tolist()
        assert plan.query_begin_2.tolist() == pairs.argmax(1).tolist()
        assert plan.key_end.tolist() == (len(single) - single[::-1].argmax(0)).tolist()
        key_pairs = visited_tiles(row_ends, row_positions, window, TILE, 2 * TILE)
        assert plan.key_order_2.tolist() == longest_first(key_pairs.sum(0))
        assert plan.key_end_2.tolist() == (len(key_pairs) - key_pairs[::-1].argmax(0)).tolist()


@pytest.mark.parametrize("seq", SEQS)
def test_tiles_that_are_visited_hold_every_pair_that_a_window_leaves(seq):
    ends, positions = (x[0].numpy() for x in random_rows(1, seq, seed=seq))
    for window in (1, 40):
        left = visited_tiles(ends, positions, window, TILE)
        mask = dense_mask(ends, positions, window)
        needed = [
            [block.any() for block in tiles_of(part.T, TILE)] for part in tiles_of(mask, TILE)
        ]
        assert not (np.array(needed) & ~left).any()


@pytest.mark.parametrize("entries", [1, 2, 3, 63, 64, 65, 511, 512, 2048])
@pytest.mark.parametrize("heads", [1, 2, 3, 7, 8, 32])
def test_every_entry_of_every_head_has_one_block(entries, heads):
    places = emulation.places(entries, heads)
    assert len(np.unique(places, axis=0)) == entries * heads
    assert places.min() == 0
    assert places.max(0).tolist() == [entries - 1, heads - 1]
    for head in range(heads):
        assert (np.diff(places[places[:, 1] == head, 0]) > 0).all(), "longest blocks first"


MULTIPROCESSORS = 132
START = 4
"""What a block costs besides its steps, in steps: a guess."""
LATENCY = 1.5
"""Steps from an addition to dq until the next block can add: a guess."""


def time_of(blocks: Iterable[float]) -> float:
    """Return when the last block ends: each starts on the multiprocessor that is free first."""
    free_at = [0.0] * MULTIPROCESSORS
    for steps in blocks:
        heapq.heapreplace(free_at, free_at[0] + START + steps)
    return max(free_at)


class Blocks(NamedTuple):
    """What the fused Hopper backward pass divides into blocks."""

    walks: list[Ints]
    """Of each entry, the tiles of queries that its blocks visit."""
    kv_heads: int
    group: int

    @property
    def ideal_time(self) -> float:
        """Steps on each multiprocessor if nothing ever waited."""
        steps = np.array([len(walk) for walk in self.walks])
        return (START + steps * self.group).sum() * self.kv_heads / MULTIPROCESSORS

    @property
    def parts(self) -> int:
        return emulation.parts_for_balance(len(self.walks) * self.kv_heads, self.group)

    def time(self) -> float:
        """Return when the last block ends if dq is added in any order."""
        parts = self.parts
        sizes = np.diff(np.arange(parts + 1) * self.group // parts)
        places = emulation.places(len(self.walks), self.kv_heads * parts)
        return time_of(len(self.walks[entry]) * sizes[head % parts] for entry, head in places)

    def time_in_order(self) -> float:
        """Return it if blocks of all heads take keys in turn, and each adds to the dq of a tile,
        for one query head after the other, once those before it have.
        """
        parts = max(self.parts, emulation.parts_in_order(self.kv_heads, self.group))
        sizes = np.diff(np.arange(parts + 1) * self.group // parts)
        tiles = max(walk.max() for walk in self.walks) + 1
        added = [np.full((tiles, size), -np.inf) for _ in range(self.kv_heads) for size in sizes]
        free_at = [0.0] * MULTIPROCESSORS
        for walk in self.walks:
            for of_head in added:
                size = of_head.shape[1]
                step = np.arange(1, len(walk) * size + 1)
                possible = of_head[walk].ravel() + LATENCY
                start = free_at[0] + START
                ends = step + np.maximum.accumulate(np.maximum(possible - step, start))
                of_head[walk] = ends.reshape(-1, size)
                heapq.heapreplace(free_at, ends[-1])
        return max(free_at)


ROWS = {
    "causal, 32k": causal_row(32768),
    "causal, 8k": causal_row(8192),
    "chats, 8k": packed_chats(8192, 10, 50, 400),
    "chats, 12k": packed_chats(12000, 10, 50, 400),
    "chats, 32k": packed_chats(32768, 10, 50, 400),
}


@functools.cache
def walks_of(row: str) -> list[Ints]:
    return [walk["tile"] for walk in emulation.walks(ROWS[row])]


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("window", [0, 1, 40, 200])
@pytest.mark.parametrize("seq", [65, 448, 700, 2200])
def test_every_block_knows_which_one_adds_to_dq_before_it(seq, window, queries, keys):
    """Otherwise it would wait forever."""
    generator = torch.Generator().manual_seed(seq + window)
    documents = [[448] * 448, *(random_visible_end(64 * length, generator) for length in (3, 1))]
    packed: list[int] = []
    for ends in documents:
        packed += [end + len(packed) for end in ends]
    for ends in (random_visible_end(seq, generator), [min(end, seq) for end in packed][:seq]):
        visible_end = torch.tensor(ends).int()[None]
        positions = tree_positions(visible_end) if window else None
        before = {}
        walks = emulation.walks(visible_end, positions, window, queries=queries, keys=keys)
        for number, walk in enumerate(walks, 1):
            assert len(np.unique(walk["tile"])) == len(walk) > 0
            for tile, found in walk:
                assert found == before.get(tile, 0)
                before[tile] = number
        assert len(before) == -(-len(ends) // queries)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (16, 2), (28, 4), (32, 32), (64, 8)])
@pytest.mark.parametrize("row", ROWS)
def test_blocks_of_the_fused_backward_pass_end_together(heads, kv_heads, row):
    blocks = Blocks(walks_of(row), kv_heads, heads // kv_heads)
    assert blocks.time() < 1.06 * blocks.ideal_time  # 1.051 at most
    slower = 1.16 if kv_heads < 4 else 1.12
    assert blocks.time_in_order() < slower * blocks.time()  # than with two more products: 1.4


def products_of(m: int, n: int, k: int) -> int:
    """Return the 16 x 8 x 16 products of a product of matrices."""
    return m // 16 * n // 8 * k // 16


def run_and_count(visible_end: Tensor, window: int = 0, d: int = 64) -> tuple[int, int]:
    """Return how many tiles forward (128 x 64) and backward (64 x 64) have computed, counting the
    products of matrices.
    """
    batch, seq = visible_end.shape
    case = make_case(
        Shape(batch, 2, 1, seq, d, d), visible_end=visible_end, dtype=torch.bfloat16, seed=seq
    )
    q, k, v, dout = (x.bfloat16() for x in (*case.inputs.values(), case.dout))
    options = {"scale": 0.1, "window": window}
    options["positions"] = case.options["positions"] if window else None
    emulation.counters()
    out, lse, plan = emulation.forward(q, k, v, visible_end, **options)
    forward = emulation.counters().products
    emulation.backward(dout, None, q, k, v, out, lse, visible_end, plan, **options)
    backward = emulation.counters().products
    # S and O; then S, dP, dQ, dV and dK: each is 64 columns deep or wide.
    of_forward = 2 * products_of(2 * TILE, TILE, d)
    of_backward = 5 * products_of(TILE, TILE, d)
    heads = 2
    assert forward % (heads * of_forward) == backward % (heads * of_backward) == 0
    return forward // (heads * of_forward), backward // (heads * of_backward)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("seq", [1, 65, 129, 700])
def test_kernels_compute_the_tiles_that_are_not_skipped_and_no_other(seq, window):
    ends, positions = random_rows(2, seq, seed=seq + 1)
    rows = list(zip(ends.numpy(), positions.numpy(), strict=True))
    pairs = sum(visited_tiles(*row, window, 2 * TILE).sum() for row in rows)
    single = sum(visited_tiles(*row, window, TILE).sum() for row in rows)
    assert run_and_count(ends, window) == (pairs, single)
    if window == 0:
        for queries, count in ((2 * TILE, pairs), (TILE, single)):
            counts = [count_tiles(row, query_tile=queries) for row in ends.numpy()]
            assert sum(partial + full for _, partial, full in counts) == count


@pytest.mark.parametrize("keys", [TILE, 2 * TILE])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("seq", SEQS)
def test_hopper_blocks_know_which_half_of_their_queries_sees_a_tile(seq, window, keys):
    ends, positions = random_rows(2, seq, seed=seq + 2)
    visits = emulation.hopper_visits(ends, positions if window else None, window, keys)
    for of_row, *row in zip(visits, ends.numpy(), positions.numpy(), strict=True):
        seen = visited_tiles(*row, window, TILE, keys)
        # A walk begins with the first 64 keys that are visited: with a window, a tile of 128 keys
        # may be visited of which neither half is.
        begins = visited_tiles(*row, window, 2 * TILE).argmax(1) * TILE // keys
        mask = dense_mask(*row, window) if window else dense_mask(row[0])
        whole = [[x.all() for x in tiles_of(part.T, keys)] for part in tiles_of(mask, TILE)]
        is_full = np.array(whole)
        is_full[:, -1] &= seq % keys == 0  # beyond the row are keys that nobody sees
        for first, begin, of_block in zip(range(0, len(seen), 2), begins, of_row, strict=True):
            of_halves = 1 << np.arange(len(seen[first : first + 2]))
            expected = of_halves @ seen[first : first + 2]
            expected[:begin] = 0
            found = of_block[: np.argmin(of_block["tile"])]
            assert of_block[len(found)].tolist()[:3] == (-1, 0, 0)
            assert found["tile"].tolist() == expected.nonzero()[0].tolist()
            assert found["seen"].tolist() == expected[found["tile"]].tolist()
            full = (of_halves @ is_full[first : first + 2])[found["tile"]]
            assert not (found["full"] & ~full).any()
            if window == 0:
                assert found["full"].tolist() == full.tolist()


@pytest.mark.parametrize(("d", "keys"), [(64, 2 * TILE), (256, TILE)])
@pytest.mark.parametrize(("row", "window"), HALF_SEEN.values(), ids=HALF_SEEN)
def test_half_of_a_hopper_block_computes_the_tiles_that_it_sees_and_no_other(row, window, d, keys):
    heads = 2
    shape = Shape(1, heads, 1, row.shape[1], d, d)
    case = make_case(shape, dtype=torch.bfloat16, visible_end=row, window=window)
    positions = case.options["positions"][0].numpy()
    seen = visited_tiles(row[0].numpy(), positions, window or 0, TILE, keys)
    of_blocks = visited_tiles(row[0].numpy(), positions, window or 0, 2 * TILE, keys)
    assert seen.sum() < 2 * of_blocks.sum()
    expected = case.run("dense")
    for seed in range(2):
        emulation.set_seed(seed)
        emulation.counters()
        out, lse = emulation.run_forward(case, torch.bfloat16, "sm90")
        assert emulation.counters().products == heads * seen.sum() * 2 * products_of(TILE, keys, d)
        assert error(out, expected["out"]) < 0.02
        assert error(lse, expected["lse"]) < 1e-5


def test_a_chat_takes_fewer_products_than_a_causal_row():
    chat = chat_row(5, 20, 60)
    forward, backward = run_and_count(chat)
    causal_forward, causal_backward = run_and_count(causal_row(chat.shape[1]))
    assert forward < 0.8 * causal_forward
    assert backward < 0.8 * causal_backward


def test_a_plan_does_not_depend_on_the_order_in_which_warps_run():
    ends, positions = random_rows(2, 700, seed=8)
    plans = []
    for seed in range(3):
        emulation.set_seed(seed)
        plans.append(emulation.make_plan(ends, positions, 40))
    assert torch.equal(plans[0], plans[1])
    assert torch.equal(plans[0], plans[2])
