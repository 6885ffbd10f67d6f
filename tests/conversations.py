"""Passes of random conversations, over the vocabulary of `tests.models`."""

from __future__ import annotations

import itertools

import numpy as np

from onepass_trl import Pass
from onepass_trl.tools.bench.workload import passes_of_turns
from tests.models import VOCAB_SIZE


def random_chat(
    num_turns: int, seed: int = 0, *, low: int = 1, high: int = 12, vocab_size: int = VOCAB_SIZE
) -> list[Pass]:
    """Passes of a conversation whose reasoning is hidden from later turns; lengths and tokens are
    random."""
    rng = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return rng.integers(3, vocab_size, rng.integers(low, high)).tolist()

    turns = ((tokens(), tokens(), [*tokens(), 2]) for _ in range(num_turns))
    return passes_of_turns(turns, start=[1])


def forked_rollouts(num_rollouts: int, seed: int = 0) -> list[Pass]:
    """Several trained completions of one prompt, two of them equal: fork copies, and weights above
    one."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, VOCAB_SIZE, 6).tolist()
    passes = []
    for index in range(num_rollouts):
        completion = [3 + index, *rng.integers(3, VOCAB_SIZE, 5).tolist(), 2]
        passes.append(Pass(prompt + completion, [0] * 6 + [1] * 7))
    return [*passes, passes[0]]


def as_record(passes: list[Pass]) -> dict[str, list[dict[str, list[int]]]]:
    """Return the conversation as a record of the `passes` form."""
    return {
        "passes": [
            {
                "input_ids": pass_.token_ids.tolist(),
                "labels": np.where(pass_.trained, pass_.token_ids, -100).tolist(),
            }
            for pass_ in passes
        ]
    }


def chat_passes(num_turns: int, user: int, reasoning: int, response: int) -> list[Pass]:
    """Passes of a chat whose template drops the reasoning of earlier turns; all tokens differ."""
    fresh = itertools.count()

    def tokens(number: int) -> list[int]:
        return list(itertools.islice(fresh, number))

    return passes_of_turns(
        (tokens(user), tokens(reasoning), tokens(response)) for _ in range(num_turns)
    )
