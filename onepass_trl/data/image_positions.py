"""What images are in a row for models that don't treat their tokens as text: positions in several
planes, and blocks that are seen in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onepass_trl.data.layout import Layout
from onepass_trl.visibility import check_visible_begin
from onepass_trl.wording import counted


def position_planes(
    row: Layout, grids: Sequence[Sequence[int]], merge_size: int
) -> NDArray[np.int64]:
    """Return positions in the row's passes, ``(4, num_tokens)``: of the text, time, height, width.

    They are those of Qwen's ``get_rope_index`` for each pass by itself (arXiv 2409.12191, section
    2.1): an image spreads its tokens over height and width, and the text after it goes on from the
    larger of the two. So an image moves every token that sees all of it, by the same amount; what
    sees it is one interval of the row.

    Args:
        row: a row, or several packed.
        grids: the patches of each image of the row: frames, rows and columns.
        merge_size: how many patches, in each direction, are one token.

    Raises:
        ValueError: if an image of this grid hasn't as many tokens as the row has for it.

    >>> from onepass_trl import Pass, build_tree, linearize
    >>> from onepass_trl.passes import ImageSource, ImageSpan
    >>> image = ImageSpan(1, 7, ImageSource("a.png"))
    >>> row = linearize(build_tree([Pass([1, *[9] * 6, 2, 3], [0] * 8 + [1], [image])]))
    >>> position_planes(row, [(1, 4, 6)], 2)
    array([[0, 1, 2, 3, 4, 5, 6, 7, 8],
           [0, 1, 1, 1, 1, 1, 1, 4, 5],
           [0, 1, 1, 1, 2, 2, 2, 4, 5],
           [0, 1, 2, 3, 1, 2, 3, 4, 5]])
    """
    shapes = [(frames, high // merge_size, wide // merge_size) for frames, high, wide in grids]
    moves = np.zeros(len(row) + 1, dtype=np.int64)
    for span, (frames, high, wide) in zip(row.images, shapes, strict=True):
        if frames * high * wide != span.end - span.begin:
            raise ValueError(
                f"the image ({span.source}) has "
                f"{counted(span.end - span.begin, 'token')} in its row, but "
                f"{frames} x {high} x {wide} by the processor: prepare the dataset with the same "
                "processor"
            )
        move = max(high, wide) - (span.end - span.begin)
        moves[span.end] += move
        moves[row.visible_end[span.end - 1]] -= move
    planes = np.tile(row.position_ids.astype(np.int64), (4, 1))
    planes[1:] += np.cumsum(moves[:-1])
    for span, shape in zip(row.images, shapes, strict=True):
        planes[1:, span.begin : span.end] = planes[1, span.begin] + np.indices(shape).reshape(3, -1)
    return planes


def image_blocks(row: Layout, is_image: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the `visible_begin` of a row, ``(num_tokens,)``: each image's tokens are a block.

    Args:
        row: a row, or several packed.
        is_image: ``(num_tokens,)``, where the model puts features of images. Of an image's span
            each run of such tokens is a block.

    Raises:
        VisibilityError: if a branch of the row begins inside of a block.

    >>> from onepass_trl import Pass, build_tree, linearize
    >>> from onepass_trl.passes import ImageSource, ImageSpan
    >>> image = ImageSpan(1, 5, ImageSource("a.png"))
    >>> row = linearize(build_tree([Pass([1, 8, 9, 9, 7, 2, 3], [0] * 6 + [1], [image])]))
    >>> image_blocks(row, row.input_ids == 9)
    array([0, 1, 2, 2, 4, 5, 6], dtype=int32)
    """
    begins = np.arange(len(row), dtype=np.int32)
    for span in row.images:
        own = slice(span.begin, span.end)
        starts = is_image[own] & ~np.append(False, is_image[own][:-1])
        first = np.maximum.accumulate(np.where(starts, begins[own], -1))
        begins[own] = np.where(is_image[own], first, begins[own])
    check_visible_begin(begins, row.visible_end)
    return begins
