"""One pass against N separate ordinary passes: the same loss and the same gradients, in float32."""

import copy
import functools

import pytest
import torch
from hypothesis import example, given, settings

from onepass_trl import Pass
from onepass_trl.tools import verify
from onepass_trl.tools.verify import compare
from onepass_trl.versions import checkpointing_option
from tests.conversations import forked_rollouts, random_chat
from tests.data.strategies import pass_lists
from tests.models import MODELS, make_model
from tests.n_pass import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    SGD,
    assert_same_batch,
    assert_same_gradients,
    assert_same_training,
    gradients,
    make_trainer,
    n_pass_loss,
)
from tests.training.conversations import WITH_ROLLOUTS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passes", [random_chat(4), forked_rollouts(3)], ids=["chat", "rollouts"])
def test_one_pass_equals_n_passes(name, passes, monkeypatch):
    monkeypatch.setattr(verify, "_GRADIENT_FLOOR", 0.0)  # each parameter against its own norm
    comparison = compare(make_model(name), passes)
    assert comparison.loss_difference <= LOSS_TOLERANCE
    assert comparison.gradient_difference <= GRADIENT_TOLERANCE, comparison.worst_parameter


cached_model = functools.cache(make_model)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "bamba"])
@settings(max_examples=25)
@given(passes=pass_lists(max_passes=5, max_length=14))
@example(passes=[Pass([0, 0, 2], [False, True, True])])  # the gradients of queries cancel
def test_one_pass_equals_n_passes_on_any_tree(name, passes):
    """Random trees: repeated, nested, disjoint passes, targets anywhere; a window inside them,
    states that branch."""
    if any(pass_.num_trained for pass_ in passes):
        comparison = compare(cached_model(name), passes)
        assert comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE), comparison


PASSES = [pass_ for conversation in WITH_ROLLOUTS for pass_ in conversation]
LONGEST = max(map(len, PASSES))


@pytest.mark.parametrize("name", ["qwen3", "gemma4", "gpt_oss", "qwen3_5_moe", "granitemoehybrid"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding_free=True),
        dict(packing=True, max_length=400),
        dict(max_length=LONGEST),
        dict(packing=True, max_length=LONGEST),
        dict(pad_to_multiple_of=64),
        {checkpointing_option(): True},
        dict(loss_type="dft"),
    ],
    ids=[
        "padded",
        "padding_free",
        "packed",
        "split",
        "split_packed",
        "multiple",
        "checkpointing",
        "dft",
    ],
)
def test_a_batch_of_the_trainer_equals_n_passes(name, options, tmp_path, tiny_tokenizer):
    reference = make_model(name)
    trainer = make_trainer(
        copy.deepcopy(reference), WITH_ROLLOUTS, tmp_path, tiny_tokenizer, **options
    )
    rows = list(trainer.train_dataset)
    if options.get("max_length") == LONGEST:
        assert len(rows) > 1
        assert max(len(row["input_ids"]) for row in rows) <= LONGEST

    batch, dft = trainer.data_collator(rows), options.get("loss_type") == "dft"
    assert_same_batch(trainer, batch, reference, PASSES, dft)


def test_activations_may_be_packed_away(tmp_path, tiny_tokenizer):
    """Activation offloading packs and unpacks what forward saves; TRL's own needs an
    accelerator."""
    trainer = make_trainer(make_model("qwen3"), WITH_ROLLOUTS, tmp_path, tiny_tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(trainer.model).items()}
    trainer.model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert_same_gradients(gradients(trainer.model), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_n_pass_training(accumulation, tmp_path, tiny_tokenizer):
    """Three steps of SGD end in the weights that N-pass training ends in."""
    reference = make_model("qwen3")
    trainer = make_trainer(
        copy.deepcopy(reference),
        WITH_ROLLOUTS,
        tmp_path,
        tiny_tokenizer,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        **SGD,
    )
    assert_same_training(trainer, reference, lambda: PASSES)


def test_the_router_loss_of_a_mixture_of_experts_is_that_of_n_passes(tmp_path, tiny_tokenizer):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    reference = make_model("qwen3_moe", router_aux_loss_coef=0.5)
    trainer = make_trainer(
        copy.deepcopy(reference), WITH_ROLLOUTS, tmp_path, tiny_tokenizer, router_aux_loss_coef=0.5
    )
    expected = n_pass_loss(reference, PASSES)
    logits = [
        reference.model(
            input_ids=torch.from_numpy(pass_.token_ids).long()[None], output_router_logits=True
        ).router_logits
        for pass_ in PASSES
    ]
    merged = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    expected = expected + 0.5 * load_balancing_loss_func(merged, 4, 2)
    expected.backward()

    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference))
    assert "aux_loss" in trainer._metrics["eval" if not trainer.model.training else "train"]
