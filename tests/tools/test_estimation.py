import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import Pass, build_tree, linearize
from onepass_trl.data import split_passes
from onepass_trl.data.image_positions import image_blocks
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import lay_out, render_record
from onepass_trl.tools import estimation_report
from onepass_trl.tools.estimation import estimate, work_of_pass, work_of_row
from onepass_trl.tools.estimation_plot import draw
from onepass_trl.tools.estimation_report import as_json, report, turn_bins
from onepass_trl.tools.flops import AttentionLayers, ModelCost, model_cost
from onepass_trl.visibility import dense_mask
from onepass_trl.vision import vision_of
from tests.chat.tokenizers import small_tokenizer
from tests.chats import CHAT
from tests.conversations import as_record, forked_rollouts, random_chat
from tests.images import CHATS, make_image_model, make_processor
from tests.models import WINDOW

OPTIONS = PreparationOptions(
    max_length=None, overflow="truncate", train_on="all", packing=False, null_arguments="keep"
)
COST = ModelCost("Toy", 10**9, linear_flops=100, head_flops=30, attention=(
    AttentionLayers(2, None, 8), AttentionLayers(1, 5, 8)
))  # fmt: skip


def chats(number=6, turns=3):
    return [(seed, as_record(random_chat(turns, seed))) for seed in range(number)]


@given(st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([None, 1, 3, 9, 400]))
def test_work_is_that_of_the_dense_mask(turns, seed, window):
    passes = [*random_chat(turns, seed, high=40), *forked_rollouts(2, seed)]
    row = linearize(build_tree(passes))
    work = work_of_row(row, [window])
    mask = dense_mask(row.visible_end, row.position_ids, window)
    assert (work.rows, work.tokens) == (1, len(row))
    assert work.pairs[window] == mask.sum()
    assert work.executed[window] >= sum(
        64**2
        for q in range(0, len(row), 64)
        for k in range(0, len(row), 64)
        if mask[q : q + 64, k : k + 64].any()
    )
    for pass_ in passes:
        alone = linearize(build_tree([pass_]))
        work, expected = (
            work_of_pass(pass_, [window], [], None),
            work_of_row(alone, [window]),
        )
        assert work == expected


@pytest.mark.parametrize("max_length", [None, 60, 25])
def test_estimate_counts_what_training_would(max_length, tiny_tokenizer):
    options = dataclasses.replace(OPTIONS, max_length=max_length)
    records = chats()
    found = estimate(records, tiny_tokenizer, options, COST)
    laid_out = [
        lay_out(render_record(record, tiny_tokenizer, options).passes, options)
        for _, record in records
    ]
    layouts = [own for _, own, _ in laid_out]
    assert found.row_tokens.tolist() == [sum(map(len, own)) for own in layouts]
    assert found.n_pass_tokens.tolist() == [
        sum(int(row.multiplicity.sum()) for row in own) for own in layouts
    ]
    assert found.num_turns.tolist() == [sum(row.num_turns for row in own) for own in layouts]
    assert found.one_pass.rows == sum(map(len, layouts))
    assert found.num_split == sum(len(own) > 1 for own in layouts)
    assert found.n_pass.scored == sum(float(row.weights.sum()) for own in layouts for row in own)
    # A chain of variable-length kernels ends at a token that none sees, and has all that it sees.
    assert found.gathered_keys == sum(
        dense_mask(row.visible_end)[row.visible_end == np.arange(len(row)) + 1].sum()
        for own in layouts
        for row in own
    )
    lost = sum(part.num_lost_tokens for _, _, part in laid_out)
    assert found.overflow.num_lost_tokens == lost
    assert (found.overflow.num_lost_tokens > 0) == (max_length == 25)
    if max_length == 60:
        assert found.packed_rows < found.one_pass.rows
    assert sum(turn_bins(found.num_turns.tolist()).values()) == len(records)


def test_operations_follow_from_tokens_and_pairs(tiny_tokenizer):
    found = estimate(chats(), tiny_tokenizer, OPTIONS, COST)
    work = found.one_pass
    flops = found.flops(work)
    assert flops["linear"] == 3 * 100 * work.tokens
    assert flops["attention"] == 3.5 * (16 * work.pairs[None] + 8 * work.pairs[5])
    assert flops["head"] == 4 * 30 * work.scored
    every = dataclasses.replace(found, scores_every_position=True)
    assert every.flops(work)["head"] == 4 * 30 * work.tokens
    total = sum(found.flops(found.n_pass).values())
    assert found.flops_ratio == pytest.approx(total / sum(flops.values()))
    with pytest.raises(ValueError, match="depend on the model"):
        _ = estimate(chats(), tiny_tokenizer, OPTIONS).flops_ratio


def test_images_are_counted_as_both_ways_encode_them():
    processor = make_processor("qwen3_vl")
    records = [(number, {"messages": chat}) for number, chat in enumerate(CHATS.values())]
    found = estimate(records, processor, OPTIONS, COST)
    passes = [render_record(record, processor, OPTIONS).passes for _, record in records]
    rows = [linearize(build_tree(own)) for own in passes]
    one, n = found.one_pass, found.n_pass
    assert one.images == sum(len(row.images) for row in rows)
    assert n.images == sum(len(pass_.images) for own in passes for pass_ in own) > one.images
    assert one.image_tokens == sum(
        (row.input_ids == processor.image_token_id).sum() for row in rows
    )
    assert n.image_tokens == sum(
        row.multiplicity[row.input_ids == processor.image_token_id].sum() for row in rows
    )
    text = text_of(found)
    assert re.search(
        rf"images encoded +{one.images} +{n.images} +{n.images / one.images:.2f}", text
    )
    assert re.search(rf"image tokens +{one.image_tokens} +{n.image_tokens} ", text)
    assert "The operations of the vision tower are left out" in text
    assert as_json(found)["n_pass"]["images"] == n.images
    assert "image" not in text_of(estimate(records_without_images(), processor, OPTIONS, COST))
    with pytest.raises(ValueError, match="row 0 of the dataset: it has images, but the model sees"):
        estimate(records, processor, OPTIONS, no_images="the model sees none")


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_images_are_counted_in_both_directions_where_they_are_seen_so(name):
    processor, cost = make_processor(name), model_cost(make_image_model(name).config)
    records = [(number, {"messages": chat}) for number, chat in enumerate(CHATS.values())]
    found = estimate(records, processor, OPTIONS, cost)
    passes = [render_record(record, processor, OPTIONS).passes for _, record in records]
    ways = {"one_pass": passes, "n_pass": [[pass_] for own in passes for pass_ in own]}
    is_image = vision_of(processor).is_image
    for way, trees in ways.items():
        work = getattr(found, way)
        rows = [linearize(build_tree(tree)) for tree in trees]
        for layers in cost.attention:
            pairs = causal = 0
            for row in rows:
                rule = row.visible_end, row.position_ids, layers.window
                begins = image_blocks(row, is_image(row.input_ids)) if layers.sees_blocks else None
                pairs += dense_mask(*rule, begins).sum()
                causal += dense_mask(*rule).sum()
            assert work.pairs[layers.window] == pairs <= work.executed[layers.window]
            assert bool(pairs > causal) is layers.sees_blocks
        assert work.images == sum(len(row.images) for row in rows)
        assert work.scored == sum((row.shift_labels >= 0).sum() for row in rows)
    assert {layers.window: layers.sees_blocks for layers in cost.attention} == {
        None: name == "gemma3",
        WINDOW: True,
    }


def records_without_images():
    return [(0, {"messages": CHAT})]


def text_of(found, **given):
    return "\n".join(report(found, **given))


def test_the_report_says_what_was_found(tiny_tokenizer):
    found = estimate(chats(), tiny_tokenizer, OPTIONS, COST)
    text = text_of(found)
    assert f"{found.longest_path.max()} (row {found.longest_path.argmax()})" in text
    assert f"{found.one_pass.tokens:,}" in text
    assert f"N-pass takes {found.flops_ratio:.2f} times as long" in text
    assert "No --max_length" in text
    assert "operations aren't known" in text_of(estimate(chats(), tiny_tokenizer, OPTIONS))


def test_the_report_says_what_max_length_loses(tiny_tokenizer):
    options = dataclasses.replace(OPTIONS, max_length=25, overflow="drop")
    found = estimate(chats(), tiny_tokenizer, options, COST)
    text = text_of(found)
    assert f"{found.overflow.num_passes} turns are longer than max_length 25" in text
    assert f"max_length {found.overflow.longest} keeps them all" in text
    assert f"become {found.packed_rows}" in text


def test_a_template_that_keeps_everything(tiny_tokenizer):
    passes = [Pass([1, 2, 3], [0, 1, 1]), Pass([1, 2, 3, 4, 5], [0, 0, 0, 0, 1])]
    assert "No token occurs twice" in text_of(
        estimate([(0, as_record(passes))], tiny_tokenizer, OPTIONS)
    )
    assert "No token occurs twice" not in text_of(estimate(chats(), tiny_tokenizer, OPTIONS))


def test_the_report_says_what_auto_takes(tiny_tokenizer, monkeypatch):
    found = estimate(chats(), tiny_tokenizer, OPTIONS, COST)
    keys = f"{found.gathered_keys / found.one_pass.tokens:.2f} keys per token"
    text = text_of(found)
    assert keys in text
    assert "'auto' takes them" in text
    monkeypatch.setattr(estimation_report, "MAX_KEYS_PER_TOKEN", 1)
    assert "'auto' takes FlexAttention" in text_of(found)


def test_turns_of_which_no_pass_can_be_made_are_named(tiny_tokenizer):
    options = dataclasses.replace(OPTIONS, invalid_turns="drop")
    question = {"role": "user", "content": "2+2?"}
    bad = {"messages": [question, {"role": "assistant", "content": "<|im_end|>"}]}
    good = {"messages": [question, {"role": "assistant", "content": "4"}]}
    found = estimate([(3, bad), (5, good), (7, {"txt": "x"})], tiny_tokenizer, options)
    text = text_of(found)
    assert len(found.invalid) == 2
    assert "no exact pass can be made of 2 turns or rows, which are left out:" in text
    assert "row 3: assistant turn 0" in text
    assert "row 7: the row has none of the accepted forms" in text
    with pytest.raises(
        ValueError, match="no exact pass can be made of 1 turn or row, which is left out"
    ):
        estimate([(7, {"txt": "x"})], tiny_tokenizer, options)


def test_conversations_that_branch_are_counted_apart(tiny_tokenizer):
    path = [Pass([1, 2, 3], [0, 1, 1]), Pass([1, 2, 3, 4, 5], [0, 0, 0, 0, 1])]
    fork = [Pass([1, 2, 3], [0, 1, 1]), Pass([1, 2, 4, 5, 6], [0, 0, 0, 0, 1])]
    records = [(0, as_record(path)), (1, as_record(fork))]
    found = estimate(records, tiny_tokenizer, OPTIONS)
    assert found.branches.tolist() == [False, True]
    ratio = (3 + 5) / build_tree(fork).num_row_tokens()
    text = text_of(found)
    assert "1 of 2 conversations branches:" in text
    assert f"N-pass computes {ratio:.2f} times the tokens" in text


def test_conversations_without_reasoning_and_with_one_turn():
    tokenizer = small_tokenizer("qwen3")
    plain = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in CHAT]
    with_reasoning, without = (
        estimate([(0, {"messages": m})], tokenizer, OPTIONS) for m in (CHAT, plain)
    )
    assert with_reasoning.has_reasoning
    assert "No trained turn has reasoning" not in text_of(with_reasoning)
    assert "No trained turn has reasoning. One pass still saves" in text_of(without)
    single = estimate([(0, {"messages": CHAT[:3]})], tokenizer, OPTIONS)
    assert "No conversation has two trained turns" in text_of(single)
    assert "No token occurs twice" not in text_of(single)
    assert "No trained turn has reasoning" not in text_of(
        estimate([(0, {"messages": plain[:3]})], tokenizer, OPTIONS)
    )


def test_conversations_of_which_nothing_is_left_are_not_taken_for_single_turns(tiny_tokenizer):
    records = [
        (0, as_record(random_chat(2, 0, high=4))),
        (1, as_record(random_chat(2, 0, low=60, high=70))),
    ]
    options = dataclasses.replace(OPTIONS, max_length=40, overflow="drop")
    found = estimate(records, tiny_tokenizer, options)
    assert found.num_turns.tolist() == [2, 0]
    assert "No conversation has two trained turns" not in text_of(found)


def test_bad_input(tiny_tokenizer):
    with pytest.raises(ValueError, match="the dataset has no rows"):
        estimate([], tiny_tokenizer, OPTIONS)
    with pytest.raises(ValueError, match=r"row 7 of the dataset: .*accepted forms"):
        estimate([*chats(1), (7, {"txt": "x"})], tiny_tokenizer, OPTIONS)
    short = dataclasses.replace(OPTIONS, max_length=2, overflow="drop")
    with pytest.raises(ValueError, match=r"nothing is left to train.*Raise max_length"):
        estimate(chats(), tiny_tokenizer, short)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60))
def test_each_conversation_is_in_one_bin(num_turns):
    bins = turn_bins(num_turns)
    assert sum(bins.values()) == len(num_turns)
    assert len(bins) <= 13
    for name, count in bins.items():
        begin, _, end = name.partition("-")
        inside = range(int(begin), int(end or begin) + 1)
        assert count == sum(turns in inside for turns in num_turns)


def test_json_and_figure(tiny_tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    options = dataclasses.replace(OPTIONS, max_length=30)
    found = estimate(chats(), tiny_tokenizer, options, COST)
    value = as_json(found)
    assert value["n_pass"]["tokens"] == found.n_pass.tokens
    assert value["one_pass"]["pairs"] == {
        "full": found.one_pass.pairs[None],
        "5": found.one_pass.pairs[5],
    }
    assert value["flops_ratio"] == found.flops_ratio
    figure = draw(found, "chats")
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == len(chats())
    heights = [bar.get_height() for bar in figure.axes[3].patches]
    assert sum(heights[::2]) == pytest.approx(sum(found.flops(found.n_pass).values()))
    draw(estimate(chats(), tiny_tokenizer, OPTIONS), "no model")


def test_split_rows_keep_their_passes(tiny_tokenizer):
    """The tokens of N-pass don't depend on how a tree is split."""
    passes = random_chat(5, 3)
    longest = max(map(len, passes))
    whole = estimate([(0, as_record(passes))], tiny_tokenizer, OPTIONS)
    split = estimate(
        [(0, as_record(passes))], tiny_tokenizer, dataclasses.replace(OPTIONS, max_length=longest)
    )
    assert len(split_passes(passes, longest)) == split.one_pass.rows > 1
    assert split.n_pass == whole.n_pass
    assert np.array_equal(split.n_pass_tokens, whole.n_pass_tokens)
