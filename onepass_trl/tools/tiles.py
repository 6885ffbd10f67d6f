"""How many tiles of a row attention executes: the compiled plan's own count."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from onepass_trl.attention import ExtensionNotBuiltError

TILE = 64  # queries and keys of a tile, as in the kernels


def count_tiles(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
) -> tuple[int, int, int]:
    """Return how many tiles on or below the diagonal are skipped, partial and full.

    Args:
        visible_end: ``(num_tokens,)`` int32.
        positions: ``(num_tokens,)`` int32; needed with a window.
        window: sliding window of the layer, None for none.

    Raises:
        ExtensionNotBuiltError: if the compiled extension is missing.

    >>> from onepass_trl.visibility import causal_visible_end
    >>> count_tiles(causal_visible_end(256))
    (0, 4, 6)
    """
    try:
        from onepass_trl import _C
    except ImportError as error:
        raise ExtensionNotBuiltError(
            f"tiles are counted by the compiled extension, which cannot be loaded ({error}): "
            "install the package, or build it with `pip install --no-build-isolation -e .`"
        ) from error
    ends = torch.from_numpy(visible_end)
    if window is None:
        return _C.tile_counts(ends, TILE, TILE)
    return _C.tile_counts(ends, TILE, TILE, torch.from_numpy(positions), window)
