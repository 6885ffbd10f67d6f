"""N-pass, to compare with: plain causal forwards of the model, one for each pass, in float32."""

from __future__ import annotations

import torch
from datasets import Dataset

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, Pass
from onepass_trl.versions import checkpointing_option
from tests.conversations import as_record

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4


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


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = torch.linalg.vector_norm(actual[name] - gradient)
        assert difference <= GRADIENT_TOLERANCE * torch.linalg.vector_norm(gradient), name
