"""Questions with traces of random tokens, over the vocabulary of the small tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

_WORDS = ["add", "two", "and", "four", "think", "step", "search", "answer", "tree", "first", "then"]


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(_WORDS, rng.integers(low, high)).tolist())


def random_set(seed: int, num_traces: int, *, turns: int = 1) -> dict[str, Any]:
    """A question of several turns whose traces share the beginning of their reasoning in pairs."""
    rng = np.random.default_rng(seed)
    prompt: list[dict[str, str]] = []
    for turn in range(turns):
        prompt.append({"role": "user", "content": words(rng, 3, 9)})
        if turn < turns - 1:
            answer = {"content": words(rng, 2, 5), "reasoning_content": words(rng, 2, 5)}
            prompt.append({"role": "assistant", **answer})
    begins = [words(rng, 3, 6) for _ in range((num_traces + 1) // 2)]
    return {
        "prompt": prompt,
        "completions": [
            {
                "role": "assistant",
                "reasoning_content": f"{begins[number // 2]} {words(rng, 4, 14)}",
                "content": words(rng, 1, 4),
            }
            for number in range(num_traces)
        ],
    }


RECORDS = [
    random_set(1, 4),
    random_set(2, 2, turns=3),
    random_set(3, 3, turns=2),
    random_set(4, 1),
]
"""Sets of four, two, three traces and one."""
