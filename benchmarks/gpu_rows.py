"""Rows of random conversations for the GPU benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onepass_trl import Pass
from onepass_trl.data import Layout, build_tree, concatenate, linearize
from onepass_trl.visibility import causal_visible_end

Ints = NDArray[np.int32]


class Row(NamedTuple):
    """What attention needs from a row."""

    visible_end: Ints
    positions: Ints


def conversation(turns: int, low: int, high: int, rng: np.random.Generator) -> list[Pass]:
    """Return the passes of a chat: messages, reasoning and responses of `low` to `high` tokens."""

    def tokens() -> list[int]:
        return rng.integers(3, 1000, rng.integers(low, high + 1)).tolist()

    trunk: list[int] = []
    passes = []
    for _ in range(turns):
        trunk += tokens()
        reasoning, response = tokens(), tokens()
        completion = reasoning + response
        passes.append(Pass(trunk + completion, [0] * len(trunk) + [1] * len(completion)))
        trunk += response
    return passes


def conversations(num_tokens: int, turns: int, low: int, high: int) -> list[list[Pass]]:
    """Return as many chats as fit into a row of `num_tokens`; at least one, which may be longer."""
    rng = np.random.default_rng(0)
    chosen: list[list[Pass]] = []
    used = 0
    while True:
        passes = conversation(turns, low, high, rng)
        used += build_tree(passes).num_row_tokens()
        if chosen and used > num_tokens:
            return chosen
        chosen.append(passes)


def lay_out(chats: list[list[Pass]]) -> Layout:
    """Return the row of the chats, one after another."""
    return concatenate([linearize(build_tree(passes)) for passes in chats])


def chat_row(seq: int, turns: int, low: int, high: int) -> Row:
    """Return a row of exactly `seq` tokens: chats one after another, the last cut off."""
    rng = np.random.default_rng(0)
    layouts: list[Layout] = []
    while sum(map(len, layouts)) < seq:
        layouts.append(linearize(build_tree(conversation(turns, low, high, rng))))
    row = concatenate(layouts)
    return Row(np.minimum(row.visible_end[:seq], np.int32(seq)), row.position_ids[:seq])


def causal_row(seq: int) -> Row:
    """Return the row of a single document."""
    return Row(causal_visible_end(seq), np.arange(seq, dtype=np.int32))
