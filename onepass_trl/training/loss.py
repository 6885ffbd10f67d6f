"""The loss of a batch as training computes it: by the model's backbone and TRL's fused LM head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from onepass_trl.attention.implementations.registry import Impl
from onepass_trl.attention.layer_inputs import visible_end_required
from onepass_trl.attention.model_check import base_model
from onepass_trl.training.context_parallel import forward_in_pieces
from onepass_trl.training.lm_head import add_fused_lm_head


def forward(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    attention_impl: Impl = "auto",
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Return the model's outputs, of which `log_probs` are those of ``shift_labels``.

    Args:
        model: with one-pass attention and TRL's fused LM head.
        inputs: `model_inputs` of a batch, and what else the model should get.
        group: processes that compute a piece of the rows each; None for whole rows.
    """
    options = {"use_cache": False, "fused_lm_head": True, "attention_impl": attention_impl}
    with visible_end_required():
        if group is None:
            return model(**inputs, **options)
        return forward_in_pieces(model, group, inputs, **options)


def target_losses(
    log_probs: torch.Tensor, weights: torch.Tensor, *, dft: bool = False
) -> torch.Tensor:
    """Return the loss of each target times its weight, ``(batch, seq)``.

    Args:
        log_probs: ``(batch, seq)``, of the targets.
        weights: ``(batch, seq)``, 0 where there is no target.
        dft: weight each target by its probability too (arXiv 2508.05629).
    """
    losses = -log_probs * weights
    return losses * log_probs.detach().exp() if dft else losses


@contextmanager
def fused_lm_head(model: nn.Module) -> Iterator[None]:
    """Give a model TRL's fused LM head, and take it away afterwards."""
    base = base_model(model)
    own_forward = vars(base).get("forward")
    add_fused_lm_head(base)
    try:
        yield
    finally:
        if own_forward is None:
            del base.forward
        else:
            base.forward = own_forward


# By what families scale or cap their logits, as the fused LM head reads it from configurations.
_OF_LOGITS = (
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
)


def check_head(model: nn.Module) -> None:
    """Raise ValueError unless the logits are the LM head of the backbone's output.

    TRL's fused LM head would leave out what lies between, and train another loss than N-pass.
    """
    base = base_model(model)
    name, backbone, head = type(base).__name__, base.base_model, base.get_output_embeddings()
    if backbone is base or head is None:
        missing = "backbone" if backbone is base else "LM head"
        raise ValueError(
            f"{name} cannot be trained in one pass: it has no {missing} of its own, expected both "
            "backbone and LM head, which TRL's fused LM head calls one after the other"
        )
    if hasattr(head, "base_layer"):  # PEFT's
        raise ValueError(
            f"{name} cannot be trained in one pass: it has an adapter on its LM head, which TRL's "
            "fused LM head leaves out; adapt other layers, or train the whole head with "
            "modules_to_save"
        )
    fused = {id(weight) for part in (backbone, head) for weight in part.parameters()}
    between = [path for path, weight in base.named_parameters() if id(weight) not in fused]
    if between:
        others = f" and {len(between) - 3} more" if len(between) > 3 else ""
        raise ValueError(
            f"{name} cannot be trained in one pass: it has {', '.join(between[:3])}{others} "
            "besides its backbone and its LM head, expected no other weights: TRL's fused LM head, "
            "which SFTTrainer trains with too, leaves them out, so the loss would be another one"
        )
    text_config, read = base.config.get_text_config(), _names_in(type(base))
    for setting in _OF_LOGITS:
        value = getattr(text_config, setting, None)
        if value not in (None, 1) and setting not in read:
            neutral = None if setting == "final_logit_softcapping" else 1.0
            raise ValueError(
                f"{name} cannot be trained in one pass: the configuration of its text model has "
                f"{setting}={value}, by which TRL's fused LM head changes the logits and {name} "
                f"itself doesn't, expected the same of both: set {setting} to {neutral} in "
                "model.config.get_text_config() to train what the model computes"
            )


def _names_in(kind: type) -> set[str]:
    """Return the names that the functions of a class mention, inherited ones included."""
    parts = (part for base in kind.__mro__ for part in vars(base).values())
    codes = [inspect.unwrap(part).__code__ for part in parts if inspect.isfunction(part)]
    mentioned = (name for code in codes for name in (*code.co_names, *code.co_consts))
    return {name for name in mentioned if isinstance(name, str)}
