"""Positions of tokens around images against the model's own `get_rope_index` of each pass, and
blocks that are seen in both directions."""

import itertools

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from onepass_trl import OnePassCollator, Pass, build_tree, linearize, render_passes
from onepass_trl.attention.image_models import IMAGE_MODELS, has_position_planes
from onepass_trl.data import concatenate
from onepass_trl.data.image_positions import image_blocks, position_planes
from onepass_trl.data.layout import target_paths
from onepass_trl.passes import ImageSource, ImageSpan
from onepass_trl.visibility import VisibilityError
from onepass_trl.vision import vision_of
from tests.images import CHATS, make_image_model, make_processor

WITH_PLANES = [
    name for name in IMAGE_MODELS if has_position_planes(type("", (), {"model_type": name}))
]


def expected_positions(model: PreTrainedModel, pass_, processor) -> torch.Tensor:
    vision = vision_of(processor)
    inputs = vision.inputs([span.source for span in pass_.images]) if pass_.images else {}
    grids = inputs.get("image_grid_thw")
    ids = pass_.token_ids
    types = vision.token_types(ids)["mm_token_type_ids"]
    positions, _ = model.model.get_rope_index(
        torch.from_numpy(ids)[None].long(), mm_token_type_ids=types, image_grid_thw=grids
    )
    return positions[:, 0]


@pytest.mark.parametrize("name", WITH_PLANES)
def test_positions_are_those_of_each_pass(name):
    """Of all conversations in one batch: padded, and in one row."""
    model, processor = make_image_model(name), make_processor(name)
    trees = [render_passes(chat, processor) for chat in CHATS.values()]
    rows = [linearize(build_tree(passes)) for passes in trees]
    for padding_free in (False, True):
        collator = OnePassCollator(
            vision=vision_of(processor), planes=True, padding_free=padding_free
        )
        planes = collator(rows)["position_ids"]
        begin = 0
        for number, (row, passes) in enumerate(zip(rows, trees, strict=True)):
            if padding_free:
                of_row = planes[:, 0, begin : begin + len(row)]
                begin += len(row)
            else:
                of_row = planes[:, number, : len(row)]
            for path, _ in target_paths(row):  # all that predict something
                ids = row.input_ids[path]
                pass_ = next(p for p in passes if np.array_equal(p.token_ids[: ids.size], ids))
                expected = expected_positions(model, pass_, processor)[:, : ids.size]
                torch.testing.assert_close(of_row[1:, path], expected)
                np.testing.assert_array_equal(of_row[0, path], np.arange(len(path)))


def test_packed_rows_have_the_positions_of_each():
    processor = make_processor("qwen3_vl")
    rows = [linearize(build_tree(render_passes(chat, processor))) for chat in CHATS.values()]
    grids = [
        vision_of(processor).inputs([span.source for span in row.images])["image_grid_thw"].tolist()
        for row in rows
    ]
    apart = [position_planes(row, grid, 2) for row, grid in zip(rows, grids, strict=True)]
    together = position_planes(concatenate(rows), list(itertools.chain(*grids)), 2)
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1))


def test_another_processor_is_refused():
    processor = make_processor("qwen3_vl")
    row = linearize(build_tree(render_passes(CHATS["tool result"], processor)))
    with pytest.raises(ValueError, match=r"has 18 tokens in its row, but 1 x 6 x 5 by the process"):
        position_planes(row, [(1, 12, 10), (1, 4, 4)], 2)


def test_blocks_are_runs_of_features_within_spans():
    """Two runs in a span, as of crops, images next to each other, and an image in a branch."""
    image, other = ImageSource("a.png"), ImageSource("b.png")
    shown = [ImageSpan(1, 7, image), ImageSpan(7, 9, other)]
    first = Pass([1, 8, 9, 9, 8, 9, 7, 9, 9, 2, 3], [0] * 10 + [1], shown)
    second = Pass([1, 5, 9, 9, 4, 2], [0] * 5 + [1], [ImageSpan(2, 4, other)])
    row = linearize(build_tree([first, second]))
    packed = concatenate([row, row])
    expected = [0, 1, 2, 2, 4, 5, 6, 7, 7, 9, 10, 11, 12, 12, 14, 15]
    begins = image_blocks(packed, packed.input_ids == 9)
    assert begins.tolist() == [*expected, *(16 + begin for begin in expected)]
    assert begins.dtype == np.int32


def test_blocks_that_a_branch_cuts_are_refused():
    passes = [Pass([1, 9, 9, 9, 2], [0] * 4 + [1]), Pass([1, 9, 9, 3], [0] * 3 + [1])]
    row = linearize(build_tree(passes))
    row.images = (ImageSpan(1, 4, ImageSource("a.png")),)
    with pytest.raises(VisibilityError, match="in the block that begins at 1, which is seen whole"):
        image_blocks(row, row.input_ids == 9)
