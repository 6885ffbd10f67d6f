import re

import numpy as np
import pytest

from onepass_trl import Pass, build_tree, linearize, render_passes
from onepass_trl.data.image_positions import image_blocks
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.tools.flops import model_cost
from onepass_trl.tools.inspection import Branch, Segment, inspect_passes, inspect_record
from onepass_trl.tools.inspection_report import figures, remarks
from onepass_trl.tools.transcript import message_starts
from onepass_trl.visibility import dense_mask
from onepass_trl.vision import vision_of
from tests.chat.tokenizers import small_tokenizer
from tests.chats import CHAT
from tests.images import CHATS, make_image_model, make_processor


def segments_of(branch):
    for item in branch.items:
        if isinstance(item, Branch):
            yield from segments_of(item)
        else:
            yield item


def text_of(found, segment):
    return "".join(found.texts[segment.begin : segment.end])


@pytest.mark.parametrize("template", ["qwen3", "deepseekv3", "gptoss"])
def test_segments_cover_the_row_once_and_hold_their_message(template):
    found = inspect_record({"messages": CHAT}, small_tokenizer(template))
    segments = sorted(segments_of(found.trunk), key=lambda segment: segment.begin)
    borders = [(segment.begin, segment.end) for segment in segments]
    assert np.array_equal(
        np.concatenate([np.arange(*b) for b in borders]), np.arange(len(found.row))
    )
    for segment in segments:
        assert set(found.trained[segment.begin : segment.end]) == {segment.trained}
    for number, message in enumerate(CHAT):
        own = [segment for segment in segments if segment.message == number]
        assert {segment.role for segment in own} == {message["role"]}
        assert message["content"] in "".join(text_of(found, segment) for segment in own)
        for other in CHAT[:number]:
            context = "".join(text_of(found, segment) for segment in own)
            assert other["content"] not in context


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_images_are_segments_of_their_message(name):
    for chat in CHATS.values():
        found = inspect_record({"messages": chat}, make_processor(name))
        segments = sorted(segments_of(found.trunk), key=lambda segment: segment.begin)
        shown = [segment for segment in segments if segment.image >= 0]
        assert [(s.begin, s.end) for s in shown] == [(i.begin, i.end) for i in found.row.images]
        for segment, image in zip(shown, found.row.images, strict=True):
            assert found.images[segment.image] == image.source
            assert text_of(found, segment) == f"[image {segment.image}]"
        for number, message in enumerate(chat):
            own = [segment for segment in segments if segment.message == number]
            assert {segment.role for segment in own} == {message["role"]}
            if isinstance(message["content"], str):
                assert not any(segment.image >= 0 for segment in own)
                continue
            given = {id(part["image"]) for part in message["content"] if part["type"] == "image"}
            assert len({segment.image for segment in own} - {-1}) == len(given)


def test_n_pass_encodes_an_image_in_every_later_turn():
    found = inspect_record({"messages": CHATS["four turns"]}, make_processor("qwen3_vl"))
    assert (len(found.images), len(found.row.images), found.n_pass_images) == (4, 4, 4 + 2 + 2 + 1)
    assert "images: one pass encodes 4, N-pass 9 = 2.25 x" in list(figures(found))
    found = inspect_record({"messages": CHATS["same image twice"]}, make_processor("qwen3_vl"))
    assert (len(found.images), len(found.row.images), found.n_pass_images) == (1, 3, 2 + 2 + 1)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_images_that_are_seen_in_both_directions_are_counted_so(name):
    processor, chat = make_processor(name), {"messages": CHATS["four turns"]}
    layers = model_cost(make_image_model(name).config).attention
    found = inspect_record(chat, processor, layers=layers)
    row, is_image = found.row, vision_of(processor).is_image
    alone = [linearize(build_tree([pass_])) for pass_ in render_passes(chat["messages"], processor)]
    for layer in layers:
        pairs, n_pass_pairs = (
            sum(
                dense_mask(
                    row.visible_end,
                    row.position_ids,
                    layer.window,
                    image_blocks(row, is_image(row.input_ids)) if layer.sees_blocks else None,
                ).sum()
                for row in rows
            )
            for rows in ([row], alone)
        )
        assert found.n_pass_pairs(layer.window) == n_pass_pairs
        lines = [line for line in figures(found, [layer]) if f"one pass {pairs:,}" in line]
        assert len(lines) == 1
        assert f"N-pass {n_pass_pairs:,} = " in lines[0]


def test_trunk_and_branches_of_a_chat(tiny_tokenizer):
    found = inspect_record({"messages": CHAT}, tiny_tokenizer)
    trunk = [item for item in found.trunk.items if isinstance(item, Segment)]
    branches = [item for item in found.trunk.items if isinstance(item, Branch)]
    assert not any(segment.trained for segment in trunk)
    assert [branch.last_turn for branch in branches] == [0, 1]
    for branch, reasoning in zip(branches, ("Let me think.", "First, add."), strict=True):
        (segment,) = branch.items
        assert segment.trained
        assert reasoning in text_of(found, segment)
    text = "".join(text_of(found, segment) for segment in trunk)
    assert "The answer is four." in text
    assert "Let me think." not in text


def test_figures_are_those_of_the_dense_mask(tiny_tokenizer):
    found = inspect_record({"messages": CHAT}, tiny_tokenizer)
    assert found.pairs == dense_mask(found.row.visible_end).sum()
    assert found.n_pass_tokens == found.row.multiplicity.sum()
    side = -(-len(found.row) // 64)
    assert sum(found.tiles) == side * (side + 1) // 2
    assert f"one pass {len(found.row):,}, N-pass {found.n_pass_tokens:,}" in "\n".join(
        figures(found)
    )
    assert not list(remarks(found))


def test_fork_copies_belong_to_the_segment_of_their_token(tiny_tokenizer):
    passes = [Pass([5, 6, 7, tail], [0, 0, 0, 1]) for tail in (8, 9, 10)]
    found = inspect_passes(passes, tiny_tokenizer)
    context, *_ = segments_of(found.trunk)
    assert (context.begin, context.end, context.num_copies, context.num_tokens) == (0, 5, 2, 3)
    assert context.role == "context"
    assert (found.row.shift_labels[found.is_copy] != IGNORE_INDEX).all()
    assert found.has_reasoning is None


def test_a_template_that_keeps_everything_needs_no_duplication():
    chat = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in CHAT]
    found = inspect_record({"messages": chat}, small_tokenizer("llama3_1"))
    assert found.is_chain
    said = " ".join(remarks(found))
    assert "no duplication is needed" in said
    assert "No trained turn has reasoning. One pass still saves" in said


def test_one_turn_saves_nothing(tiny_tokenizer):
    found = inspect_record({"messages": CHAT[:3]}, tiny_tokenizer)
    assert list(remarks(found)) == [
        "Only one turn is trained, so one pass computes the same as N-pass."
    ]


def test_rows_of_passes(tiny_tokenizer):
    row = {
        "passes": [
            {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
            {"input_ids": [5, 6, 8], "labels": [-100, -100, 8]},
        ]
    }
    found = inspect_record(row, tiny_tokenizer)
    assert {segment.role for segment in segments_of(found.trunk)} == {"context", "completion"}


@pytest.mark.parametrize("template", ["qwen3", "deepseekv3", "gptoss"])
def test_tool_calls_and_results_have_their_roles(template):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": '{"sum": "4"}'},
        {"role": "assistant", "content": "It is four."},
    ]
    found = inspect_record({"messages": chat}, small_tokenizer(template))
    segments = list(segments_of(found.trunk))
    results = [segment for segment in segments if segment.role == "tool"]
    assert "sum" in "".join(text_of(found, segment) for segment in results)
    assert not any("add" in text_of(found, s) for s in segments if s.role == "user")
    assert {segment.message for segment in results} == {2}
    assert all(s.role == "assistant" for s in segments if s.trained)


def test_a_message_that_is_not_found_goes_with_the_next():
    added = re.compile("<.>")
    chat = [{"role": "user", "content": text} for text in ("one", "two", "three")]
    assert message_starts("<s>one<e><s>TWO<e><s>three<e><s>", chat, added, ["<e>"]) == [
        *(0, None),
        *(9, 29),
    ]
