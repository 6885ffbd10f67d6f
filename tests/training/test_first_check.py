"""The model is verified on a row of the dataset before the first step."""

import logging
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given

from onepass_trl import Pass, build_tree, linearize
from onepass_trl.attention import transformers_backend
from onepass_trl.data.layout import concatenate, separate, target_paths
from onepass_trl.training.first_check import MAX_TOKENS, Difference, choose_row
from tests.conversations import as_record, random_chat
from tests.data.strategies import pass_lists
from tests.models import MODELS, make_model

MESSAGE = "does not compute in one pass what it computes in"


@given(pass_lists(), pass_lists())
def test_the_paths_of_a_row_are_its_passes(first, second):
    row = concatenate([linearize(build_tree(first)), linearize(build_tree(second))])
    found = set()
    for path, targets in target_paths(row):
        ids = row.input_ids[path].tolist()
        assert row.position_ids[path].tolist() == list(range(len(path)))
        found |= {(*ids[: n + 1], int(row.shift_labels[path[n]])) for n in targets}
    expected = {
        tuple(pass_.token_ids[: n + 1].tolist())
        for pass_ in [*first, *second]
        for n in np.flatnonzero(pass_.trained)
    }
    assert found == expected
    assert sum(map(len, separate(row))) == len(row)


def row_of(*passes):
    return linearize(build_tree([Pass(ids, [0, *[1] * (len(ids) - 1)]) for ids in passes]))


def test_the_smallest_tree_with_several_passes_is_chosen():
    one, small, large = row_of([1, 2]), row_of([1, 2, 3], [1, 4]), row_of(range(9), [0, 2])
    assert len(choose_row([concatenate([one, large]), small])) == len(small)
    assert len(choose_row([one, large])) == len(large)
    assert len(choose_row([one, row_of(range(MAX_TOKENS)), row_of([1, 2, 3])])) == len(one)
    assert choose_row([row_of(range(MAX_TOKENS + 1))]) is None


def ignores_visible_end(monkeypatch, model):
    """Attention that sees everything before it, in the last layer only."""
    attention = model.model.layers[-1].self_attn
    forward = attention.forward

    def causal(*args, visible_end=None, **kwargs):
        if visible_end is not None:
            visible_end = torch.full_like(visible_end, visible_end.shape[1])
        return forward(*args, visible_end=visible_end, **kwargs)

    monkeypatch.setattr(attention, "forward", causal)


def ignores_positions(monkeypatch, model):
    """A rotary embedding that counts tokens along the row."""
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def counting(x, position_ids, *args, **kwargs):
        return forward(x, torch.arange(x.shape[1])[None].expand_as(position_ids), *args, **kwargs)

    monkeypatch.setattr(rotary, "forward", counting)


@pytest.mark.parametrize("mistake", [ignores_visible_end, ignores_positions])
@pytest.mark.parametrize("options", [dict(), dict(packing=True, max_length=300)])
def test_a_model_that_ignores_the_tree_is_not_trained(train, monkeypatch, mistake, options):
    trainer = train(**options)
    mistake(monkeypatch, trainer.model)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_the_check_can_be_switched_off(train, monkeypatch):
    trainer = train(verify_model=False)
    ignores_positions(monkeypatch, trainer.model)
    trainer.train()


def test_a_wrong_kernel_is_found(train, monkeypatch):
    """Wrong on an ordinary pass too, which isn't taken for rounding."""
    attend = transformers_backend.tree_attention

    def wrong(query, key, value, visible_end, **kwargs):
        return attend(query, key, value.roll(1, dims=2), visible_end, **kwargs)

    trainer = train()
    monkeypatch.setattr(transformers_backend, "tree_attention", wrong)
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.train()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_supported_model_passes(train, caplog, name, dtype):
    trainer = train(make_model(name).to(dtype), max_steps=1)
    with caplog.at_level(logging.INFO, "onepass_trl.training.first_check"):
        trainer._verify_model(trainer.model)
    [record] = [r for r in caplog.records if "One pass gives" in r.message]
    assert int(re.search(r"log-probabilities of (\d+) passes", record.message)[1]) >= 2
    assert trainer.model.training


def test_a_stream_is_verified_too(train, caplog):
    def generate():
        yield from [as_record(random_chat(2, seed=seed)) for seed in range(4)]

    trainer = train(dataset=IterableDataset.from_generator(generate), max_steps=1)
    with caplog.at_level(logging.INFO, "onepass_trl.training.first_check"):
        trainer.train()
    assert "One pass gives the log-probabilities of 2 passes" in caplog.text


def test_rows_that_are_all_too_long_are_said_to_be(train, caplog, monkeypatch):
    monkeypatch.setattr("onepass_trl.training.first_check.MAX_TOKENS", 10)
    trainer = train(dataset=Dataset.from_list([as_record(random_chat(2))]), max_steps=1)
    with caplog.at_level(logging.INFO, "onepass_trl.training.first_check"):
        trainer.train()
    assert "The model is not verified" in caplog.text


@pytest.mark.parametrize(
    ("one_pass", "rounding", "dtype", "passes"),
    [
        (5e-5, 0.0, torch.float32, True),
        (5e-4, 0.0, torch.float32, False),
        (5e-4, 2e-4, torch.float32, True),  # TF32
        (0.05, 0.05, torch.float32, False),
        (0.04, 0.0, torch.bfloat16, True),
        (0.4, 0.02, torch.bfloat16, False),
        (0.04, 0.0, torch.float8_e4m3fn, True),
        (float("nan"), 0.0, torch.bfloat16, False),
        (float("nan"), float("nan"), torch.bfloat16, True),  # not by one pass: the loss is NaN
    ],
)
def test_what_is_rounding(one_pass, rounding, dtype, passes):
    difference, model = Difference(one_pass, rounding, 2, 9), make_model("llama")
    if passes:
        difference.check(model, dtype)
    else:
        with pytest.raises(ValueError, match=MESSAGE):
            difference.check(model, dtype)
