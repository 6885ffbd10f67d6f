"""Costs against K x M separate forwards; loss and gradients against separate matched passes."""

import copy

import numpy as np
import pytest
import torch

from onepass_trl.versions import checkpointing_option
from tests.n_pass import (
    LOSS_TOLERANCE,
    SGD,
    assert_same_batch,
    assert_same_gradients,
    assert_same_training,
    gradients,
    n_pass_loss,
)
from tests.setsft.sets import RECORDS
from tests.setsft.trainers import NUM_TOKENS, batch_of, forking_model, make_trainer

MODELS = ("llama", "qwen3", "gpt_oss", "qwen3_5")


def separate_costs(model, set_, token_ids, num_targets=None, reduction="mean"):
    """The loss of each trace after each token, one plain causal forward for each pair."""
    costs = np.zeros((len(token_ids), len(set_.traces)))
    for i, token in enumerate(token_ids):
        for j, trace in enumerate(set_.traces):
            pass_ = trace.after(token)
            ids = torch.from_numpy(pass_.token_ids).long()[None]
            with torch.no_grad():
                log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            losses = -log_probs.gather(1, ids[0, 1:, None])[:, 0][pass_.trained[1:]]
            losses = losses[:num_targets].double()
            costs[i, j] = losses.mean() if reduction == "mean" else losses.sum()
    return costs


def matched_passes(trainer, batch, model):
    """The passes that a matching by separate costs trains."""
    from scipy.optimize import linear_sum_assignment

    token_ids = trainer.forking_tokens().ids
    passes = []
    for set_ in batch["sets"]:
        tokens, traces = linear_sum_assignment(separate_costs(model, set_, token_ids))
        assert sorted(traces) == list(range(len(set_.traces)))
        passes += [set_.traces[j].after(token_ids[i]) for i, j in zip(tokens, traces, strict=True)]
    return passes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(matching_batch=3),
        dict(matching_batch=100),
        dict(max_length=10_000),
        dict(matching_tokens=6, matching_reduction="sum"),
        dict(matching_tokens=1),
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_costs_equal_separate_forwards(name, options, tmp_path):
    reference, tokenizer = forking_model(name)
    trainer = make_trainer(copy.deepcopy(reference), tokenizer, tmp_path, **options)
    sets = batch_of(trainer)["sets"]
    assert [len(set_.traces) for set_ in sets] == [4, 2, 3, 1]
    costs = trainer.matching_costs(trainer.model, sets)
    for set_, actual in zip(sets, costs, strict=True):
        expected = separate_costs(
            reference,
            set_,
            trainer.forking_tokens().ids,
            options.get("matching_tokens"),
            options.get("matching_reduction", "mean"),
        )
        assert actual.shape == (NUM_TOKENS, len(set_.traces))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        assert expected.std(axis=0).min() > 1e-4  # the tokens differ, so that a mix-up would show


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding_free=True),
        dict(packing=True, max_length=300),
        dict(max_length=95),
        dict(packing=True, max_length=95),
        {checkpointing_option(): True},
    ],
    ids=["padded", "padding_free", "packed", "split", "split_packed", "checkpointing"],
)
def test_a_batch_equals_separate_matched_passes(name, options, tmp_path):
    reference, tokenizer = forking_model(name)
    trainer = make_trainer(copy.deepcopy(reference), tokenizer, tmp_path, **options)
    if options.get("max_length") == 300:
        assert len(trainer.train_dataset) < len(RECORDS)
    batch = batch_of(trainer)
    passes = matched_passes(trainer, batch, reference)
    if options.get("max_length") == 95:
        assert sum(map(len, passes[:4])) - 3 * batch["sets"][0].traces[0].fork > 95
    assert_same_batch(trainer, batch, reference, passes)


@pytest.mark.parametrize("name", MODELS)
def test_lora_equals_separate_matched_passes(name, tmp_path):
    """The adapter and the rows of the forking tokens, tied to the output (Qwen3) or not."""
    from peft import LoraConfig

    model, tokenizer = forking_model(name)
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM")
    trainer = make_trainer(model, tokenizer, tmp_path, trainer_kwargs={"peft_config": config})
    generator = torch.Generator().manual_seed(0)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    rows = [p for n, p in trained.items() if "trainable_tokens" in n]
    assert [tuple(p.shape) for p in rows] == [(NUM_TOKENS, 32)]
    assert all("lora_" in n or "trainable_tokens" in n for n in trained)

    trainer.model.eval()  # without dropout, which the matching never has
    batch = batch_of(trainer)
    passes = matched_passes(trainer, batch, trainer.model)
    expected = n_pass_loss(trainer.model, passes)
    expected.backward()
    expected_gradients = {name: g.clone() for name, g in gradients(trainer.model).items()}
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert expected_gradients.keys() == trained.keys()
    assert_same_gradients(gradients(trainer.model), expected_gradients)


def test_costs_have_no_dropout_and_training_has(tmp_path):
    from peft import LoraConfig

    model, tokenizer = forking_model("llama")
    config = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = make_trainer(model, tokenizer, tmp_path, trainer_kwargs={"peft_config": config})
    trainer.model.train()
    sets = batch_of(trainer)["sets"]
    first, second = (trainer.matching_costs(trainer.model, sets) for _ in range(2))
    np.testing.assert_array_equal(np.hstack(first), np.hstack(second))
    assert trainer.model.training


def test_bfloat16_autocast_keeps_the_gradients_of_all_weights(tmp_path):
    """Weights that the matching cast without gradient must not be reused for training."""
    model, tokenizer = forking_model("llama")
    trainer = make_trainer(model, tokenizer, tmp_path, bf16=True)
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    loss.backward()
    trained = gradients(trainer.model)
    assert trained.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in trained.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_training_on_separate_matched_passes(accumulation, tmp_path):
    """Three steps of SGD end in the same weights; the matching follows the weights."""
    reference, tokenizer = forking_model("qwen3")
    trainer = make_trainer(
        copy.deepcopy(reference),
        tokenizer,
        tmp_path,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        **{**SGD, "learning_rate": 0.3},
    )
    batch = batch_of(trainer)
    assert_same_training(trainer, reference, lambda: matched_passes(trainer, batch, reference))
