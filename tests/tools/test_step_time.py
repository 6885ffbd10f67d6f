import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl import build_tree, linearize
from onepass_trl.tools import step_time
from onepass_trl.tools.estimation import Work, estimate, work_of_causal_pass, work_of_row
from onepass_trl.tools.flops import model_cost
from onepass_trl.tools.step_time import choose_probes, fit, measure, spread
from tests.conversations import as_record, random_chat
from tests.images import CHATS, make_image_model, make_processor
from tests.models import make_model

from .test_estimation import OPTIONS


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 2**31))
def test_a_fit_finds_times_that_follow_the_model(coefficients, seed):
    rng = np.random.default_rng(seed)
    works = [
        work_of_causal_pass(int(length), 1, [None, 50])
        for length in rng.choice(np.arange(1, 3000), 8, replace=False)
    ]
    weights = {None: 3, 50: 1}
    true = [
        coefficients[0] + coefficients[1] * work.tokens / 1e3
        + coefficients[2] * (3 * work.executed[None] + work.executed[50]) / 1e6 + 1e-3
        for work in works
    ]  # fmt: skip
    time = fit(works, true, weights)
    assert time.largest_error < 1e-3
    total = Work()
    for work in works:
        total.add(work)
    assert time.seconds(total) == pytest.approx(sum(true), rel=1e-3)


def test_spread_is_from_the_shortest_to_the_longest():
    lengths = np.array([7, 3, 9, 1, 5])
    assert lengths[spread(lengths, 3)].tolist() == [1, 5, 9]
    assert sorted(spread(lengths, 10)) == [0, 1, 2, 3, 4]
    assert spread(np.array([4]), 6) == [0]


def test_probes_are_no_longer_than_max_length(tiny_tokenizer):
    options = dataclasses.replace(OPTIONS, max_length=30, overflow="error")
    chats = [as_record(random_chat(4, seed)) for seed in range(3)]
    rows, passes = choose_probes(chats, tiny_tokenizer, options)
    assert max(map(len, rows)) <= 30
    assert max(map(len, passes)) <= 30
    assert all(pass_.num_trained for pass_ in passes)


def test_nothing_to_measure(tiny_tokenizer):
    options = dataclasses.replace(OPTIONS, max_length=5)
    with pytest.raises(ValueError, match="nothing to measure: of 1 conversation, "):
        choose_probes([as_record(random_chat(1, low=20, high=30))], tiny_tokenizer, options)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_both_ways_are_measured(name):
    passes = [pass_ for seed in range(3) for pass_ in random_chat(2, seed)]
    rows = [linearize(build_tree(random_chat(2, seed))) for seed in range(3)]
    model, runs = make_model(name), []
    times = measure(
        model, rows, passes, {None: 1, 5: 1}, repeats=1, progress=lambda: runs.append(1)
    )
    assert len(runs) == 2 * (len(rows) + len(passes))
    for time in times:
        assert time.seconds(work_of_row(rows[0], [None, 5])) > 0
        assert 0 <= time.largest_error < np.inf


def test_a_fit_finds_the_time_of_images():
    works = [
        Work(1, n, n, executed=Counter({None: n * n}), image_tokens=images)
        for n, images in [(100, 0), (200, 150), (300, 40), (400, 300), (500, 90)]
    ]
    seconds = [1 + 0.01 * w.tokens + 1e-5 * w.tokens**2 + 0.05 * w.image_tokens for w in works]
    time = fit(works, seconds, {None: 1})
    assert time.per_image_token == pytest.approx(0.05, rel=1e-3)
    assert time.seconds(works[1]) == pytest.approx(seconds[1], rel=1e-3)


def test_rows_with_images_are_measured():
    model, processor = make_image_model("qwen3_vl"), make_processor("qwen3_vl")
    chats = [{"messages": chat} for chat in CHATS.values()]
    rows, passes = choose_probes(chats, processor, OPTIONS)
    assert any(row.images for row in rows)
    times = measure(model, rows, passes, {None: 2}, processing_class=processor, repeats=1)
    assert all(time.seconds(work_of_row(rows[0], [None])) > 0 for time in times)
    with pytest.raises(ValueError, match="has images, which need the model's processor"):
        measure(model, rows, passes, {None: 2})


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3_vl"])
def test_the_passes_of_the_fit_are_counted_as_those_that_it_predicts(name, monkeypatch):
    """With images that are seen in both directions, in layers without a window."""
    model, processor = make_image_model(name), make_processor(name)
    record = {"messages": CHATS["four turns"]}
    cost, fitted = model_cost(model.config), []
    found = estimate([(0, record)], processor, OPTIONS, cost)
    _, passes = choose_probes([record], processor, OPTIONS)
    assert len(passes) == found.n_pass.rows
    monkeypatch.setattr(step_time, "_seconds", lambda *_: 1.0)
    monkeypatch.setattr(step_time, "fit", lambda works, *_: fitted.append(works))
    measure(model, [], passes, {None: 2}, processing_class=processor, repeats=1)
    total = Work()
    for work in fitted[1]:
        total.add(work)
    assert total.pairs[None] == found.n_pass.pairs[None]
    assert total.executed[None] == found.n_pass.executed[None]
    causal = sum(len(pass_) * (len(pass_) + 1) // 2 for pass_ in passes)
    assert (total.pairs[None] > causal) is (name == "gemma3")


def test_images_that_are_seen_in_both_directions_are_measured_so(monkeypatch):
    model, processor = make_image_model("gemma3"), make_processor("gemma3")
    rows, passes = choose_probes([{"messages": CHATS["four turns"]}], processor, OPTIONS)
    batches = []
    monkeypatch.setattr(step_time, "_seconds", lambda _, batch: batches.append(batch) or 1.0)
    measure(model, rows, passes, {None: 2}, processing_class=processor, repeats=1)
    [begins] = batches[0]["visible_begin"].tolist()
    image = rows[0].images[0]
    assert begins.count(begins[image.begin + 1]) > 1
    works = []
    monkeypatch.setattr(step_time, "work_of_row", lambda *args: works.append(args) or Work(1, 1, 1))
    measure(model, rows, passes, {None: 2, 9: 1}, processing_class=processor, repeats=1)
    assert [{window: list(own) for window, own in args[2].items()} for args in works[-1:]] == [
        {None: begins, 9: begins}
    ]
