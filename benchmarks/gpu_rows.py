"""Rows of random conversations for the GPU benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onepass_trl import Pass
from onepass_trl.data import Layout, build_tree, concatenate, linearize
from onepass_trl.tools.bench.workload import chat_passes
from onepass_trl.visibility import causal_visible_end


class Row(NamedTuple):
    """What attention needs from a row: ``(seq,)`` int32 each."""

    visible_end: NDArray[np.int32]
    positions: NDArray[np.int32]


def chats(turns: int, low: int, high: int) -> Iterator[list[Pass]]:
    """Yield the passes of one chat after another, always the same ones.

    Messages, reasoning and responses have `low` to `high` tokens.
    """
    length = (low, high)
    return _chats(turns, length, length, length)


def agents(turns: int) -> Iterator[list[Pass]]:
    """Yield the passes of one agent's run after another: long results of tools, short calls."""
    return _chats(turns, (100, 1500), (50, 300), (30, 100))


def _chats(turns: int, *lengths: tuple[int, int]) -> Iterator[list[Pass]]:
    rng = np.random.default_rng(0)
    while True:
        yield chat_passes(turns, *lengths, 1000, rng)


def rollouts(prompt: int, branches: int, length: int) -> Iterator[list[Pass]]:
    """Yield sets of completions of `length` tokens, each set of one prompt of `prompt` tokens."""
    rng = np.random.default_rng(0)
    while True:
        shared = rng.integers(0, 1000, prompt)
        trained = np.arange(prompt + length) >= prompt
        yield [
            Pass(np.concatenate([shared, rng.integers(0, 1000, length)]), trained)
            for _ in range(branches)
        ]


def conversations(num_tokens: int, turns: int, low: int, high: int) -> list[list[Pass]]:
    """Return as many chats as fit into a row of `num_tokens`; at least one, which may be longer."""
    chosen: list[list[Pass]] = []
    used = 0
    for passes in chats(turns, low, high):
        used += build_tree(passes).num_row_tokens()
        if chosen and used > num_tokens:
            break
        chosen.append(passes)
    return chosen


def lay_out(conversations: list[list[Pass]]) -> Layout:
    """Return the row of the conversations, one after another."""
    return concatenate([linearize(build_tree(passes)) for passes in conversations])


def filled_row(seq: int, conversations: Iterable[list[Pass]]) -> Row:
    """Return a row of exactly `seq` tokens: conversations one after another, the last cut off."""
    layouts: list[Layout] = []
    for passes in conversations:
        layouts.append(linearize(build_tree(passes)))
        if sum(map(len, layouts)) >= seq:
            break
    row = concatenate(layouts)
    return Row(np.minimum(row.visible_end[:seq], np.int32(seq)), row.position_ids[:seq])


def causal_row(seq: int) -> Row:
    """Return the row of a single document."""
    return Row(causal_visible_end(seq), np.arange(seq, dtype=np.int32))
