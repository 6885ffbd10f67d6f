"""The `visible_end` of rows that the package itself lays out, for the tests of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from onepass_trl.data import Layout, build_tree, concatenate, linearize, pack, split_passes
from onepass_trl.visibility import causal_visible_end
from tests.conversations import forked_rollouts, random_chat


def causal_row(seq: int) -> Tensor:
    return torch.from_numpy(causal_visible_end(seq))[None]


def chat_row(num_turns: int, low: int, high: int, seed: int = 0) -> Tensor:
    """Return the row of a chat whose messages have `low` to `high` tokens."""
    layout = linearize(build_tree(random_chat(num_turns, seed, low=low, high=high)))
    return torch.from_numpy(layout.visible_end)[None]


def packed_chats(seq: int, num_turns: int, low: int, high: int) -> Tensor:
    """Return a row of exactly `seq` tokens: chats one after another, the last cut off."""
    layouts: list[Layout] = []
    while sum(map(len, layouts)) < seq:
        passes = random_chat(num_turns, len(layouts), low=low, high=high)
        layouts.append(linearize(build_tree(passes)))
    ends = concatenate(layouts).visible_end[:seq]
    return torch.from_numpy(ends.clip(max=seq))[None]


def packed_row(max_length: int, low: int, high: int, seed: int = 0) -> Tensor:
    """Return the fullest of the rows into which chats, split where too long, and rollouts that fork
    are packed.
    """
    conversations = [random_chat(1 + i % 6, seed + i, low=low, high=high) for i in range(8)]
    conversations.append(forked_rollouts(3, seed))
    trees = [tree for passes in conversations for tree in split_passes(passes, max_length)]
    layouts = [linearize(tree) for tree in trees]
    groups = pack([len(layout) for layout in layouts], max_length)
    rows = [concatenate([layouts[index] for index in group]) for group in groups]
    return torch.from_numpy(max(rows, key=len).visible_end)[None]
