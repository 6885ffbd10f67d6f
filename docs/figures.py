"""The figures of the site: python docs/figures.py

They are drawn from what the package computes for the conversation of how_it_works.md, in colours
that are readable on a light and a dark page.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from onepass_trl import Layout, Pass, build_tree, linearize
from onepass_trl.tools.bench.workload import passes_of_turns
from onepass_trl.visibility import dense_mask, num_visible_pairs

FOLDER = Path(__file__).parent / "figures"
# The kinds of tokens by their tens, as in how_it_works.md: h, t and r of a turn.
_COLOURS = {1: "#90a4ae", 2: "#ffb74d", 3: "#4db6ac"}
_LINE = "#808080"
_CELL = 26

H, T, R = [[11, 12], [13], [14]], [[21, 22], [23, 24], [25, 26]], [[31], [32], [33]]


def conversation() -> list[Pass]:
    """Return the passes of the three turns."""
    return passes_of_turns(zip(H, T, R, strict=True))


def name_of(token: int) -> str:
    """Return the segment of a token: h1, t1, r1, ..."""
    for letter, segments in zip("htr", (H, T, R), strict=True):
        for turn, tokens in enumerate(segments, start=1):
            if token in tokens:
                return f"{letter}{turn}"
    raise AssertionError(token)


def passes_figure() -> str:
    """Return the figure of the three passes, one below the other."""
    parts = []
    for number, pass_ in enumerate(conversation()):
        y = number * (_CELL + 14) + 6
        parts.append(_text(0, y + 18, f"pass {number + 1}", anchor="start"))
        for index, (token, trained) in enumerate(zip(pass_.token_ids, pass_.trained, strict=True)):
            parts.append(_token(64 + index * _CELL, y, int(token), bool(trained)))
    return _svg(64 + 9 * _CELL + 4, 3 * (_CELL + 14), parts, "three passes, trained tokens framed")


def tree_figure() -> str:
    """Return the figure of the tree: its trunk, and below it the branches."""
    x, trunk, parts = 4, [*H[0], *R[0], *H[1], *R[1], *H[2]], []
    for index, token in enumerate(trunk):
        parts.append(_token(x + index * _CELL, 6, token, False))
    end = x + len(trunk) * _CELL
    for index, token in enumerate([*T[2], *R[2]]):
        parts.append(_token(end + index * _CELL, 6, token, True))
    for turn, after in ((1, 4), (0, 2)):
        y = 6 + (2 - turn) * (_CELL + 18)
        left = x + after * _CELL
        middle = y + _CELL / 2
        parts.append(
            f'<path d="M{left - 8} {6 + _CELL} V{middle} H{left + 6}" '
            f'fill="none" stroke="{_LINE}"/>'
        )
        for index, token in enumerate([*T[turn], *R[turn]]):
            parts.append(_token(left + 6 + index * _CELL, y, token, True))
    return _svg(x + 9 * _CELL + 4, 2 * (_CELL + 18) + _CELL + 12, parts, "the tree of the passes")


def row_figure() -> str:
    """Return the figure of the row: which query (a line) sees which key (a column)."""
    row = linearize(build_tree(conversation()))
    mask = dense_mask(row.visible_end)
    left = top = _CELL + 8
    parts = []
    for index, token in enumerate(row.input_ids.tolist()):
        parts.append(_token(left + index * _CELL, 2, token, False))
        parts.append(_token(2, top + index * _CELL, token, False))
        label = int(row.shift_labels[index])
        target = name_of(label) if label >= 0 else ""
        parts.append(
            _text(left + len(row) * _CELL + 8, top + index * _CELL + 18, target, anchor="start")
        )
    for query in range(len(row)):
        for key in range(len(row)):
            x, y = left + key * _CELL, top + query * _CELL
            fill = _COLOURS[int(row.input_ids[key]) // 10] if mask[query, key] else "none"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{fill}" '
                f'stroke="{_LINE}" stroke-opacity="0.4"/>'
            )
    parts.append(_text(left + len(row) * _CELL + 8, 20, "target", anchor="start"))
    size = left + len(row) * _CELL
    return _svg(size + 60, top + len(row) * _CELL + 4, parts, "who sees whom in the row")


def cost_figure() -> str:
    """Return the bars of scaling.md: N-pass over one pass, tokens and pairs."""
    parts, y, scale = [], 8, 14
    for turns in (1, 3, 10, 30, 100):
        row = one_row_of(turns)
        tokens = sum(map(len, row[0])) / len(row[1].input_ids)
        pairs = sum(len(one) * (len(one) + 1) // 2 for one in row[0])
        pairs /= num_visible_pairs(row[1].visible_end)
        parts.append(_text(64, y + 24, f"{turns} turn{'s' * (turns > 1)}", anchor="end"))
        for ratio, colour, what in ((tokens, _COLOURS[3], "tokens"), (pairs, _COLOURS[2], "pairs")):
            parts.append(
                f'<rect x="74" y="{y}" width="{ratio * scale:.1f}" height="14" fill="{colour}"/>'
            )
            label = f"{ratio:.2f} x {what}"
            parts.append(_text(80 + ratio * scale, y + 12, label, anchor="start"))
            y += 17
        y += 12
    return _svg(430, y, parts, "N-pass over one pass")


def one_row_of(turns: int) -> tuple[list[Pass], Layout]:
    """Return passes and row of a conversation with 300, 800 and 200 tokens a turn."""
    context: list[int] = []
    passes, ids = [], iter(range(1_000_000))
    for _ in range(turns):
        context = context + list(islice(ids, 300))
        thought, answer = list(islice(ids, 800)), list(islice(ids, 200))
        trained = [False] * len(context) + [True] * 1000
        passes.append(Pass(context + thought + answer, trained))
        context = context + answer
    return passes, linearize(build_tree(passes))


def _token(x: float, y: float, token: int, framed: bool) -> str:
    frame = 'stroke="#d84315" stroke-width="2.5"' if framed else f'stroke="{_LINE}"'
    return (
        f'<rect x="{x + 1.5}" y="{y}" width="{_CELL - 3}" height="{_CELL}" rx="3" '
        f'fill="{_COLOURS[token // 10]}" {frame}/>'
        + _text(x + _CELL / 2, y + 18, name_of(token), colour="#102027")
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", colour: str = _LINE) -> str:
    return f'<text x="{x:g}" y="{y}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="13"><title>{title}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


FIGURES = {
    "passes.svg": passes_figure,
    "tree.svg": tree_figure,
    "row.svg": row_figure,
    "cost.svg": cost_figure,
}

if __name__ == "__main__":
    for file, draw in FIGURES.items():
        (FOLDER / file).write_text(draw())
