import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onepass_trl import Pass
from onepass_trl.tools import mask_picture
from onepass_trl.tools.inspection import inspect_passes, inspect_record
from onepass_trl.tools.mask_picture import colours, rasterize, stretches
from onepass_trl.tools.plots import save
from onepass_trl.visibility import causal_visible_end, dense_mask
from tests.attention.cases import random_visible_begin, random_visible_end
from tests.conversations import forked_rollouts, random_chat
from tests.images import A, B, answer, make_processor, part, text

pytest.importorskip("matplotlib")


def cell_means(pairs: np.ndarray, size: int) -> np.ndarray:
    bounds = np.arange(0, len(pairs), size)
    total, area = pairs.astype(int), np.ones(pairs.shape, dtype=int)
    for axis in (0, 1):
        total, area = (np.add.reduceat(x, bounds, axis=axis) for x in (total, area))
    return total / area


@settings(max_examples=25)
@given(
    seq=st.one_of(st.integers(1, 300), st.sampled_from([511, 512, 513, 1100])),
    max_cells=st.sampled_from([16, 20, 64, 1024]),
    seed=st.integers(0, 2**31),
    has_blocks=st.booleans(),
)
def test_the_raster_is_the_dense_mask_cell_by_cell(seq, max_cells, seed, has_blocks):
    generator = torch.Generator().manual_seed(seed)
    ends = random_visible_end(seq, generator)
    begins = None
    if has_blocks:
        begins = np.array(random_visible_begin(ends, generator), dtype=np.int32)
    ends = np.array(ends, dtype=np.int32)
    raster = rasterize(ends, begins, max_cells=max_cells)
    assert len(raster.seen) == -(-seq // raster.cell) <= max_cells
    assert raster.cell % 64 == 0 or 64 % raster.cell == 0

    mask = dense_mask(ends, visible_begin=begins)
    kinds = np.zeros((seq, seq), dtype=int)  # of each pair's tile: skipped, partial, full
    for q in range(0, seq, 64):
        for k in range(0, seq, 64):
            tile = mask[q : q + 64, k : k + 64]
            kinds[q : q + 64, k : k + 64] = int(tile.any()) + int(tile.all())
    for share, pairs in (
        (raster.seen, mask),
        (raster.partial, kinds == 1),
        (raster.full, kinds == 2),
    ):
        np.testing.assert_allclose(share, cell_means(pairs, raster.cell), atol=1e-6)


def test_images_are_marked_and_those_with_room_drawn():
    chat = [{"role": "user", "content": [part(A), part(B), text("Same?")]}, answer("No." * 30)]
    chat += [{"role": "user", "content": [part(A), text("And this one?")]}, answer("A.")]
    found = inspect_record({"messages": chat}, make_processor("qwen3_vl"))
    figure = mask_picture.draw(found, "images")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.texts if "image" in label.get_text()] == [
        "image 0",
        "image 0",
    ]
    _, *drawn = axes.images
    assert [picture.get_array().shape for picture in drawn] == [(24, 40, 3)] * 2
    for picture in drawn:  # above the diagonal
        left, _, bottom, _ = picture.get_extent()
        assert bottom < left
    assert axes.get_xlim() == (0, len(found.row))
    assert "tokens of an image" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_long_row_takes_no_memory_of_its_square():
    ends = causal_visible_end(100_000)
    raster = rasterize(ends, max_cells=256)
    assert raster.seen.shape == (224, 224)
    assert raster.cell == 448
    assert raster.seen[5, 4] == raster.full[5, 4] == 1
    assert raster.seen[4, 5] == 0


def test_cells_have_the_colour_of_what_they_hold():
    picture = colours(rasterize(causal_visible_end(192)))
    assert picture.shape == (192, 192, 3)
    named = {
        tuple(np.round(picture[query, key], 3)) for query, key in [(150, 3), (70, 66), (66, 70)]
    }
    assert len(named) == 3
    assert tuple(picture[0, 191]) == (1, 1, 1)


@pytest.mark.parametrize("passes", [random_chat(6), forked_rollouts(3), random_chat(1)])
def test_stretches_cover_the_row_once(passes, tiny_tokenizer):
    found = inspect_passes(passes, tiny_tokenizer)
    ordered = sorted((begin, end) for _, begin, end in stretches(found.trunk))
    covered = np.concatenate([np.arange(*stretch) for stretch in ordered])
    assert np.array_equal(covered, np.arange(len(found.row)))
    names = [name for name, *_ in stretches(found.trunk)]
    assert "trunk" in names


def test_the_figure_says_what_it_shows(tiny_tokenizer, tmp_path):
    found = inspect_passes(random_chat(3, low=40, high=60), tiny_tokenizer)
    figure = mask_picture.draw(found, "chats.jsonl, row 7")
    (axes,) = figure.axes
    words = {text.get_text() for text in axes.texts}
    assert words == {"trunk", "turn 0", "turn 1", "turn 2"}
    assert figure.get_suptitle() == "chats.jsonl, row 7"
    assert f"{found.pairs:,} useful pairs" in axes.get_title()
    assert axes.get_xlim() == (0, len(found.row))
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert f"({found.tiles[2]:,} tiles)" in legend
    save(figure, tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_one_token_is_a_picture_too(tiny_tokenizer, tmp_path):
    found = inspect_passes([Pass([5], [False])], tiny_tokenizer)
    figure = mask_picture.draw(found, "")
    assert "; 1 turn;" in figure.axes[0].get_title()
    assert figure.axes[0].get_images()[0].get_array().shape == (1, 1, 3)
    save(figure, tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
