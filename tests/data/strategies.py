"""Hypothesis strategies for passes that share prefixes, and the N-pass meaning of passes and
rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import strategies as st

from onepass_trl import Layout, Pass
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.visibility import dense_mask

Examples = Counter[tuple[tuple[int, ...], int]]


@st.composite
def pass_lists(draw: st.DrawFn, max_passes: int = 6, max_length: int = 9) -> list[Pass]:
    """Passes over a vocabulary of three tokens, so that prefixes are shared and repeated a lot."""
    passes = []
    for _ in range(draw(st.integers(1, max_passes))):
        prefix: list[int] = []
        if passes and draw(st.booleans()):
            base = draw(st.sampled_from(passes)).token_ids.tolist()
            prefix = base[: draw(st.integers(0, len(base)))]
        rest = draw(st.lists(st.integers(0, 2), max_size=max_length - len(prefix)))
        ids = prefix + rest or [0]
        trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        passes.append(Pass(ids, [False, *trained[1:]]))
    return passes


def examples_of_passes(passes: list[Pass]) -> Examples:
    """Count what N separate passes train: (everything before a target, the target)."""
    return Counter(
        (tuple(pass_.token_ids[:index].tolist()), int(pass_.token_ids[index]))
        for pass_ in passes
        for index in np.flatnonzero(pass_.trained)
    )


def examples_of_row(row: Layout) -> Examples:
    """Count what a row trains, reading only the metadata that the model gets: visible tokens,
    position, target."""
    mask = dense_mask(row.visible_end)
    examples: Examples = Counter()
    for index in np.flatnonzero(row.shift_labels != IGNORE_INDEX):
        visible = np.flatnonzero(mask[index])
        assert row.position_ids[visible].tolist() == list(range(visible.size))
        assert visible[-1] == index
        context = tuple(row.input_ids[visible].tolist())
        examples[context, int(row.shift_labels[index])] += int(row.weights[index])
    return examples
