"""An inspected row as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from onepass_trl.tools.flops import AttentionLayers
from onepass_trl.tools.inspection import Branch, Inspection
from onepass_trl.tools.inspection_report import figures, name_of, remarks
from onepass_trl.tools.thumbnails import thumbnail_of
from onepass_trl.tools.transcript import visible_text
from onepass_trl.visibility import TILE, coverage, cut_into_tiles

_MOST_TILES = 256  # on a side of the picture
_MOST_THUMBNAILS = 64


def to_html(found: Inspection, title: str, layers: Sequence[AttentionLayers] = ()) -> str:
    """Return the page: text in ASCII, of a size linear in the tokens, which loads nothing.

    `layers` are those of the model, if it is known: the page shows each of their windows. Images
    are embedded as thumbnails, the first 64 of them.

    The conversation is embedded as JSON in which no character has a meaning in HTML, and is added
    to the document only as text. The page's policy allows its own script and no other, and the
    thumbnails.

    Raises:
        ImageError: if an image can't be read.
    """
    page = files("onepass_trl.tools").joinpath("page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    # In one pass: the inserted text is never searched again, whatever it contains.
    parts = {
        "$TITLE": html.escape(visible_text(title)),
        "$SCRIPT_HASH": f"sha256-{digest}",
        "$DATA": _as_script_data(_data(found, layers)),
    }
    return re.sub(r"\$(TITLE|SCRIPT_HASH|DATA)\b", lambda match: parts[match[0]], page)


def _as_script_data(value: Any) -> str:
    """Return JSON that is safe inside a <script> element: ASCII without <, > and &."""
    text = json.dumps(value, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _data(found: Inspection, layers: Sequence[AttentionLayers]) -> dict[str, Any]:
    row = found.row
    segments: list[dict[str, Any]] = []
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    return {
        "ids": row.input_ids.tolist(),
        "texts": [visible_text(text) for text in found.texts],
        "positions": row.position_ids.tolist(),
        "labels": row.shift_labels.tolist(),
        "weights": row.weights.tolist(),
        "visibleEnd": row.visible_end.tolist(),
        "visibleBegin": next((begins.tolist() for begins in found.begins.values()), None),
        "layers": [_tiles(found, window) for window in (None, *windows)],
        "trained": found.trained.astype(int).tolist(),
        "copies": found.is_copy.nonzero()[0].tolist(),
        "images": _images(found),
        "outline": _outline(found.trunk, "trunk", segments),
        "segments": sorted(segments, key=lambda segment: segment["begin"]),
        "figures": [*figures(found, layers), *remarks(found)],
    }


def _images(found: Inspection) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = [{"name": visible_text(str(image))} for image in found.images]
    for image, source in zip(images[:_MOST_THUMBNAILS], found.images, strict=False):
        thumbnail = thumbnail_of(source)
        image["size"] = f"{thumbnail.width} x {thumbnail.height}"
        image["uri"] = thumbnail.as_uri()
    return images


def _tiles(found: Inspection, window: int | None) -> dict[str, Any]:
    """Return the picture of who sees whom in layers with or without a window, tile by tile.

    Tiles are those of the kernels, or larger if there are more than a picture can show. `kinds` has
    a text for each tile of queries, with a digit per tile of keys: 0 for skipped, 1 for partial, 2
    for full. It ends at the diagonal, or after it with the last one that is visited. `blocks` says
    whether these layers see images in both directions.
    """
    row, tile = found.row, TILE
    while len(row) > tile * _MOST_TILES:
        tile *= 2
    begins = found.begins.get(window)
    tiles = cut_into_tiles(row.visible_end, row.position_ids, tile, begins)
    visited, full = coverage(tiles, tiles, window)
    kinds = visited.astype(int) + full
    ends = [max(number, *of.nonzero()[0]) + 1 for number, of in enumerate(visited)]
    return {
        "window": window,
        "tile": tile,
        "kinds": ["".join(map(str, of[:end])) for of, end in zip(kinds, ends, strict=True)],
        "blocks": begins is not None,
    }


def _outline(branch: Branch, name: str, segments: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a branch as nested objects; collect its segments, which the objects name by `begin`.

    A segment's `place` names the branch that it belongs to.
    """
    items: list[Any] = []
    for item in branch.items:
        if isinstance(item, Branch):
            items.append(_outline(item, name_of(item), segments))
            continue
        items.append(item.begin)
        number = "" if item.message < 0 else f" {item.message}"
        segments.append(
            {
                "begin": item.begin,
                "end": item.end,
                "size": item.size,
                "role": f"{item.role}{number}",
                "place": name,
                "trained": item.trained,
                "passes": item.multiplicity,
                "image": item.image,
            }
        )
    return {"name": name, "items": items}
