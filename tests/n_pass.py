"""N-pass, to compare with: plain causal forwards of the model, one for each pass, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, Pass
from onepass_trl.versions import checkpointing_option
from tests.conversations import as_record

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4
SGD: dict[str, Any] = dict(
    optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0
)
"""Options with which a step is easy to repeat by hand, see `assert_same_training`."""


def n_pass_loss(model: torch.nn.Module, passes: list[Pass], dft: bool = False) -> torch.Tensor:
    """The mean loss of the trained tokens, one plain causal forward for each pass."""
    total, count = torch.zeros(()), 0
    for pass_ in passes:
        ids = torch.from_numpy(pass_.token_ids).long()[None]
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = log_probs.gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(pass_.trained[1:])]
        total = total - (chosen * chosen.detach().exp() if dft else chosen).sum()
        count += chosen.numel()
    return total / count


def make_trainer(model, conversations, output_dir, tokenizer, **options) -> OnePassSFTTrainer:
    settings = dict(
        max_length=None, report_to="none", bf16=False, use_cpu=True, router_aux_loss_coef=0.0
    )
    settings[checkpointing_option()] = False
    return OnePassSFTTrainer(
        model,
        OnePassSFTConfig(str(output_dir), **{**settings, **options}),
        train_dataset=Dataset.from_list([as_record(passes) for passes in conversations]),
        processing_class=tokenizer,
    )


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, floor: float = 0.0):
    """Compare each gradient by its norm, or by the share `floor` of the norm of all together: what
    is less is a sum of terms that cancel."""
    assert actual.keys() == expected.keys()
    norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in expected.items()}
    least = floor * torch.stack(list(norms.values())).norm()
    for name, gradient in expected.items():
        difference = torch.linalg.vector_norm(actual[name] - gradient)
        assert difference <= GRADIENT_TOLERANCE * max(norms[name], least), name


def assert_same_batch(trainer, batch, reference, passes: list[Pass], dft: bool = False):
    """Compare the loss and the gradients of a trainer's batch with those of a model's passes."""
    expected = n_pass_loss(reference, passes, dft)
    expected.backward()
    num_items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert num_items == sum(pass_.num_trained for pass_ in passes)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference))


def assert_same_training(trainer, reference, passes_of_step: Callable[[], list[Pass]]):
    """Train with `SGD`, and compare losses and weights with steps of N-pass."""
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = []
    for _ in logged:
        reference.zero_grad()
        loss = n_pass_loss(reference, passes_of_step())
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter -= trainer.args.learning_rate * parameter.grad
    assert len(logged) == trainer.args.max_steps
    assert logged == pytest.approx(losses, rel=1e-4)
    assert logged[-1] < logged[0]
    for (name, actual), expected in zip(
        trainer.model.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=name)
