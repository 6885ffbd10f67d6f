"""Hypothesis strategies for passes that share prefixes, and the N-pass meaning of passes and
rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from onepass_trl import Layout, Pass
from onepass_trl.passes import IGNORE_INDEX, ImageSource, ImageSpan
from onepass_trl.visibility import dense_mask

Examples = Counter[tuple[tuple[Any, ...], int]]


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


IMAGES = {2: ("a", 2), 3: ("b", 2), 4: ("c", 3)}
"""Symbols that are images, which have all the same token: their names and numbers of tokens."""


@st.composite
def image_pass_lists(draw: st.DrawFn, max_passes: int = 6, max_symbols: int = 7) -> list[Pass]:
    """Passes of two text tokens and three images that share prefixes, as `pass_lists` are."""
    passes: list[Pass] = []
    drawn: list[list[int]] = []
    for _ in range(draw(st.integers(1, max_passes))):
        base = draw(st.sampled_from(drawn)) if drawn else []
        prefix = base[: draw(st.integers(0, len(base)))]
        rest = draw(st.lists(st.integers(0, 4), max_size=max_symbols - len(prefix)))
        drawn.append(prefix + rest or [0])
        passes.append(_pass_of(drawn[-1], draw(st.lists(st.booleans(), min_size=9, max_size=9))))
    return passes


def _pass_of(symbols: list[int], trained: list[bool]) -> Pass:
    ids: list[int] = []
    flags: list[bool] = []
    images: list[ImageSpan] = []
    for number, symbol in enumerate(symbols):
        name, length = IMAGES.get(symbol, ("", 1))
        if name:
            images.append(ImageSpan(len(ids), len(ids) + length, ImageSource(name)))
        after_text = number > 0 and symbols[number - 1] not in IMAGES
        ids += [9 if name else symbol] * length
        flags += [trained[number] and after_text and not name] * length
    return Pass(ids, flags, images)


def _tokens(holder: Pass | Layout, ids: np.ndarray) -> np.ndarray:
    """The tokens as objects: ids, and for those of images their names and places in the image."""
    tokens = ids.astype(object)
    for span in holder.images:
        for place, index in enumerate(range(span.begin, span.end)):
            tokens[index] = (span.source.path, place, span.end - span.begin)
    return tokens


def examples_of_passes(passes: list[Pass]) -> Examples:
    """Count what N separate passes train: (everything before a target, the target)."""
    return Counter(
        (tuple(_tokens(pass_, pass_.token_ids)[:index].tolist()), int(pass_.token_ids[index]))
        for pass_ in passes
        for index in np.flatnonzero(pass_.trained)
    )


def examples_of_row(row: Layout) -> Examples:
    """Count what a row trains, reading only the metadata that the model gets: visible tokens,
    position, target."""
    mask = dense_mask(row.visible_end)
    tokens = _tokens(row, row.input_ids)
    examples: Examples = Counter()
    for index in np.flatnonzero(row.shift_labels != IGNORE_INDEX):
        visible = np.flatnonzero(mask[index])
        assert row.position_ids[visible].tolist() == list(range(visible.size))
        assert visible[-1] == index
        context = tuple(tokens[visible].tolist())
        examples[context, int(row.shift_labels[index])] += int(row.weights[index])
    return examples
