"""One pass against N separate ordinary passes: the same loss and the same gradients, in float32."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings

from onepass_trl.tools import verify
from onepass_trl.tools.verify import compare
from onepass_trl.versions import checkpointing_option
from tests.conversations import forked_rollouts, random_chat
from tests.data.strategies import pass_lists
from tests.models import MODELS, make_model
from tests.n_pass import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    assert_same_gradients,
    gradients,
    make_trainer,
    n_pass_loss,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passes", [random_chat(4), forked_rollouts(3)], ids=["chat", "rollouts"])
def test_one_pass_equals_n_passes(name, passes, monkeypatch):
    monkeypatch.setattr(verify, "_GRADIENT_FLOOR", 0.0)  # each parameter against its own norm
    comparison = compare(make_model(name), passes)
    assert comparison.loss_difference <= LOSS_TOLERANCE
    assert comparison.gradient_difference <= GRADIENT_TOLERANCE, comparison.worst_parameter


cached_model = functools.cache(make_model)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "bamba"])
@settings(max_examples=25, deadline=None)
@given(passes=pass_lists(max_passes=5, max_length=14))
def test_one_pass_equals_n_passes_on_any_tree(name, passes):
    """Random trees: repeated, nested, disjoint passes, targets anywhere; a window inside them,
    states that branch."""
    if any(pass_.num_trained for pass_ in passes):
        comparison = compare(cached_model(name), passes)
        assert comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE), comparison


CONVERSATIONS = [
    random_chat(4, seed=1),
    random_chat(2, seed=2),
    forked_rollouts(3),
    random_chat(1, seed=3),
]
LONGEST = max(len(pass_) for passes in CONVERSATIONS for pass_ in passes)


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
        copy.deepcopy(reference), CONVERSATIONS, tmp_path, tiny_tokenizer, **options
    )
    rows = list(trainer.train_dataset)
    if options.get("max_length") == LONGEST:
        assert len(rows) > 1
        assert max(len(row["input_ids"]) for row in rows) <= LONGEST

    passes = [pass_ for conversation in CONVERSATIONS for pass_ in conversation]
    expected = n_pass_loss(reference, passes, dft=options.get("loss_type") == "dft")
    expected.backward()

    batch = trainer.data_collator(rows)
    num_items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert num_items == sum(pass_.num_trained for pass_ in passes)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference))


def test_activations_may_be_packed_away(tmp_path, tiny_tokenizer):
    """Activation offloading packs and unpacks what forward saves; TRL's own needs an
    accelerator."""
    trainer = make_trainer(make_model("qwen3"), CONVERSATIONS, tmp_path, tiny_tokenizer)
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
        CONVERSATIONS,
        tmp_path,
        tiny_tokenizer,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train()

    passes = [pass_ for conversation in CONVERSATIONS for pass_ in conversation]
    losses = []
    for _ in range(3):
        reference.zero_grad()
        loss = n_pass_loss(reference, passes)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert logged[-1] < logged[0]
    for (name, actual), expected in zip(
        trainer.model.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_router_loss_of_a_mixture_of_experts_is_that_of_n_passes(tmp_path, tiny_tokenizer):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    reference = make_model("qwen3_moe", router_aux_loss_coef=0.5)
    trainer = make_trainer(
        copy.deepcopy(reference), CONVERSATIONS, tmp_path, tiny_tokenizer, router_aux_loss_coef=0.5
    )
    passes = [pass_ for conversation in CONVERSATIONS for pass_ in conversation]
    expected = n_pass_loss(reference, passes)
    logits = [
        reference.model(
            input_ids=torch.from_numpy(pass_.token_ids).long()[None], output_router_logits=True
        ).router_logits
        for pass_ in passes
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
