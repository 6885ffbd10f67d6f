"""Who sees whom in an inspected row, as a picture: its tiles and pairs, its trunk and branches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.tools.inspection import Branch, Inspection
from onepass_trl.tools.plots import ONE_PASS, new_figure
from onepass_trl.tools.thumbnails import thumbnail_of
from onepass_trl.visibility import TILE, coverage, cut_into_tiles
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 1024  # on a side of the picture, at most

_FULL, _SEEN, _MASKED, _SKIPPED = "#0b4f6c", "#5aa9c8", "#f2b866", "#ffffff"
_TRUNK, _BRANCHES = "#4b5563", (ONE_PASS, "#8fc1d4")
_IMAGE = "#a3379b"
_NARROWEST_LABELLED = 0.062  # of the row
_THUMBNAIL = 0.14  # of the row, the side of the square that holds one


@dataclass(frozen=True, eq=False)
class Raster:
    """A row's pairs of query and key in square cells.

    Attributes:
        num_tokens: of the row.
        cell: number of queries, and of keys, in a cell.
        full: ``(cells, cells)`` float32, queries first: the share of a cell's pairs in full tiles,
            where every pair is visible.
        partial: the share in partial tiles.
        seen: the share that is visible.
    """

    num_tokens: int
    cell: int
    full: NDArray[np.float32]
    partial: NDArray[np.float32]
    seen: NDArray[np.float32]


def rasterize(
    visible_end: NDArray[np.int32],
    visible_begin: NDArray[np.int32] | None = None,
    *,
    max_cells: int = CELLS,
) -> Raster:
    """Return the raster of a row without a window: time O(seq^2 / 64), memory O(max_cells^2 + seq).

    Args:
        visible_end: ``(num_tokens,)`` int32, at least one token.
        visible_begin: ``(num_tokens,)`` int32, None without blocks.
        max_cells: how many cells a side may have.
    """
    num_tokens = visible_end.size
    begin = np.arange(num_tokens, dtype=np.int32) if visible_begin is None else visible_begin
    cell = next((c for c in (1, 2, 4, 8, 16, 32) if c * max_cells >= num_tokens), TILE)
    if cell == TILE:
        cell *= -(-num_tokens // (TILE * max_cells))
    # Counted on a grid whose step divides both tiles and cells.
    step, strip = min(cell, TILE), max(cell, TILE)
    per_tile, per_cell = TILE // step, cell // step
    bounds = np.append(np.arange(0, num_tokens, step, dtype=np.int32), np.int32(num_tokens))
    shares: list[list[NDArray[np.float32]]] = [[], [], []]
    tiles = cut_into_tiles(visible_end, None, TILE, visible_begin)
    for at in range(0, num_tokens, strip):
        rows = bounds[at // step : (at + strip) // step + 1]
        area = np.diff(rows)[:, None] * np.diff(bounds)[None, :]
        seen = _seen_pairs(begin, visible_end, rows, step)
        visited, full = coverage(tiles[at // TILE : (at + strip) // TILE], tiles)
        parts = (_spread(full, per_tile, area), _spread(visited & ~full, per_tile, area))
        for share, pairs in zip(shares, (*parts, seen), strict=True):
            share.append((_add_blocks(pairs, per_cell) / _add_blocks(area, per_cell)).astype("f4"))
    return Raster(num_tokens, cell, *map(np.concatenate, shares))


def _seen_pairs(
    begin: NDArray[np.int32], end: NDArray[np.int32], rows: NDArray[np.int32], step: int
) -> NDArray[np.int32]:
    """Return how many pairs are visible in each cell of `step` keys, between each two of `rows`.

    The queries from `begin` to `end` see a key.
    """
    cells = np.arange(0, begin.size, step)
    # How many of the queries before i see key j.
    before = [np.add.reduceat(np.clip(i - begin, 0, end - begin), cells) for i in rows]
    return np.diff(np.stack(before), axis=0)


def _add_blocks(x: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    if size == 1:
        return x
    x = np.add.reduceat(x, np.arange(0, x.shape[0], size), axis=0)
    return np.add.reduceat(x, np.arange(0, x.shape[1], size), axis=1)


def _spread(tiles: NDArray[np.bool_], size: int, area: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return how many pairs of each cell lie in the tiles that are true."""
    cells = tiles.repeat(size, axis=0)[: area.shape[0]].repeat(size, axis=1)[:, : area.shape[1]]
    return cells * area


def colours(raster: Raster) -> NDArray[np.float32]:
    """Return the picture, ``(cells, cells, 3)`` float32 in 0..1: a cell mixes its colours."""
    from matplotlib.colors import to_rgb

    seen_in_partial = raster.seen - raster.full
    parts = (
        (_FULL, raster.full),
        (_SEEN, seen_in_partial),
        (_MASKED, raster.partial - seen_in_partial),
        (_SKIPPED, 1 - raster.full - raster.partial),
    )
    mixed = sum(share[..., None] * np.array(to_rgb(name), dtype="f4") for name, share in parts)
    return np.clip(np.asarray(mixed, dtype=np.float32), 0, 1)


def draw(found: Inspection, title: str) -> Figure:
    """Return the picture of an inspected row; its layers without a window.

    Queries go down and keys to the right. Bands along both axes show trunk, branches and images.
    Above the diagonal, where at most an image's tokens see each other, are thumbnails of as many
    images as have room.

    Raises:
        ImageError: if an image can't be read.
    """
    raster = rasterize(found.row.visible_end, found.begins.get(None))
    figure = new_figure(8.6, 9.2)
    axes = figure.add_subplot()
    end = raster.num_tokens
    side = raster.cell * len(raster.seen)  # the last cell may extend beyond the row
    is_fine = raster.cell == 1
    axes.imshow(
        colours(raster),
        extent=(0, side, side, 0),
        interpolation="nearest" if is_fine else "antialiased",
    )
    axes.set(xlim=(0, end), ylim=(end, 0), xlabel="key (token of the row)", ylabel="query")
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    for spine in axes.spines.values():
        spine.set(color="#9ca3af", linewidth=0.6)
    _draw_bands(axes, found)
    _draw_images(axes, found)
    _describe(figure, axes, found, title)
    return figure


def stretches(branch: Branch, name: str = "trunk") -> Iterator[tuple[str, int, int]]:
    """Yield ``(name, begin, end)`` of each run of the row that is in one branch.

    They come in reading order, not in the row's.
    """
    own: list[tuple[int, int]] = []
    for item in branch.items:
        if isinstance(item, Branch):
            yield from stretches(item, _label(item))
        elif own and own[-1][1] == item.begin:
            own[-1] = own[-1][0], item.end
        else:
            own.append((item.begin, item.end))
    for begin, end in own:
        yield name, begin, end


def _label(branch: Branch) -> str:
    return f"turn {branch.last_turn}" if branch.turns == 1 else counted(branch.turns, "turn")


def _draw_bands(axes: Axes, found: Inspection) -> None:
    """Draw trunk and branches above the keys and to the right of the queries."""
    end = len(found.row)
    thickness, gap = 0.028 * end, 0.008 * end
    style: dict[str, Any] = {"clip_on": False, "linewidth": 0.5, "edgecolor": "white"}
    number = 0
    for name, begin, stop in sorted(stretches(found.trunk), key=lambda stretch: stretch[1]):
        colour = _TRUNK if name == "trunk" else _BRANCHES[number % 2]
        number += name != "trunk"
        width = stop - begin
        axes.add_patch(_rectangle((begin, -gap), width, -thickness, facecolor=colour, **style))
        axes.add_patch(_rectangle((end + gap, begin), thickness, width, facecolor=colour, **style))
        if width < _NARROWEST_LABELLED * end:
            continue
        text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "clip_on": False}
        text["color"] = "black" if colour == _BRANCHES[1] else "white"
        middle = (begin + stop) / 2
        axes.text(middle, -gap - thickness / 2, name, **text)
        axes.text(end + gap + thickness / 2, middle, name, rotation=-90, **text)


def _draw_images(axes: Axes, found: Inspection) -> None:
    """Mark the tokens of images in the bands, and draw those that have room above the diagonal."""
    end = len(found.row)
    gap, thickness, side = 0.008 * end, 0.012 * end, _THUMBNAIL * end
    free_from = 0.0
    for span in found.row.images:
        length = span.end - span.begin
        style: dict[str, Any] = {"facecolor": _IMAGE, "clip_on": False}
        axes.add_patch(_rectangle((span.begin, -gap), length, -thickness, **style))
        axes.add_patch(_rectangle((end + gap, span.begin), thickness, length, **style))
        # Its square is to the upper right of what the image's tokens see of each other.
        left = min(max(span.end, side), end - side)
        bottom = min(max(span.begin, side), left)
        if left < free_from:
            continue
        free_from = left + side
        thumbnail = thumbnail_of(span.source).image
        width, height = (0.85 * side * pixels / max(thumbnail.size) for pixels in thumbnail.size)
        left, bottom = left + 0.05 * side, bottom - 0.05 * side
        top = bottom - height
        axes.imshow(np.asarray(thumbnail), extent=(left, left + width, bottom, top))
        frame: dict[str, Any] = {"facecolor": "none", "edgecolor": _IMAGE}
        axes.add_patch(_rectangle((left, top), width, height, **frame))
        number = found.images.index(span.source)
        axes.text(left, top - gap, f"image {number}", fontsize=8)
    axes.set(xlim=(0, end), ylim=(end, 0))  # which imshow changes


def _rectangle(corner: tuple[float, float], width: float, height: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **style)


def _describe(figure: Figure, axes: Axes, found: Inspection, title: str) -> None:
    """Write title, figures and legend."""
    from matplotlib.patches import Patch

    skipped, partial, full = found.tiles
    executed = (partial + full) * TILE**2
    turns = len(found.pass_lengths)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes.set_title(
        f"{counted(len(found.row), 'token')} in one pass; {counted(turns, 'turn')}; "
        f"N-pass computes {found.token_ratio:.2f} times the tokens\n"
        f"{found.pairs:,} useful pairs in layers without a window; tiles of {TILE} x {TILE} "
        f"compute {executed / found.pairs:.2f} times those",
        fontsize=9,
        color="#374151",
        pad=26,
    )
    entries = [
        (_FULL, f"full tile: every pair is visible ({counted(full, 'tile')})"),
        (_SEEN, f"visible pair of a partial tile ({counted(partial, 'tile')})"),
        (_MASKED, "masked pair of a partial tile: computed in vain"),
        (_SKIPPED, f"not computed ({counted(skipped, 'tile')} below the diagonal)"),
        (_TRUNK, "trunk: what later turns see"),
        (_BRANCHES[0], "branch: hidden from later turns"),
        *([(_IMAGE, "tokens of an image")] if found.row.images else []),
    ]
    figure.legend(
        handles=[
            Patch(facecolor=c, edgecolor="#9ca3af", lw=0.5, label=text) for c, text in entries
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8.5,
    )
