"""A fused LM head: log-probabilities of targets without the logits of a row.

TRL's own where it has one for every device, see `versions.FUSED_LM_HEAD`; in its place one in
PyTorch, with the same interface: with ``fused_lm_head=True`` the model returns a `FusedOutput`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl.trainer import utils

from onepass_trl import versions
from onepass_trl.attention.model_check import text_model
from onepass_trl.passes import IGNORE_INDEX

# The most logits that are in memory at once: 0.5 GiB in float32.
_LOGITS_AT_ONCE = 2**27


def add_fused_lm_head(model: PreTrainedModel) -> None:
    """Make ``model(.., shift_labels=.., fused_lm_head=True)`` return what `FusedOutput` has.

    With ``labels`` in place of ``shift_labels`` they are shifted. Otherwise the model's forward is
    what it was.
    """
    if versions.FUSED_LM_HEAD.installed:
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        return
    own_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at its signature
    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        return _scored(self, *args, **kwargs) if fused_lm_head else own_forward(*args, **kwargs)

    model.forward = MethodType(forward, model)


def check_sharded_head(model: PreTrainedModel) -> None:
    """Raise ValueError for a head whose gradient FSDP2 would not average over the processes.

    The fused head reads the weight without calling the model's own, so FSDP2 gathers it only if
    accelerate has sharded it together with the embeddings or with the last norm, which it doesn't
    find in multimodal models.
    """
    weight = model.get_output_embeddings().weight
    is_tied = weight is model.get_input_embeddings().weight
    if text_model(model) is not model and not is_tied and weight.requires_grad:
        raise ValueError(
            f"{type(model).__name__} has an LM head of its own, whose gradient FSDP would not "
            "average over the processes: freeze it (lm_head.requires_grad_(False)), train "
            "adapters, or use DDP or DeepSpeed"
        )


@dataclass
class FusedOutput(ModelOutput):
    """Of each token, ``(batch, seq)``: of its target, or 0 where there is none."""

    loss: Tensor | None = None
    """Mean of ``-log_probs``, and the auxiliary loss of a mixture of experts if it is asked for."""
    log_probs: Tensor | None = None
    """float32, with gradients."""
    entropy: Tensor | None = None
    """float32, of the prediction, in nats."""
    is_top1: Tensor | None = None
    """Whether the target has the largest probability."""
    label_mask: Tensor | None = None
    """Whether there is a target."""
    aux_loss: Tensor | None = None


def _scored(
    model: PreTrainedModel,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> FusedOutput:
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = model.base_model(*args, **{**kwargs, "use_cache": False})
    hidden_states = outputs.last_hidden_state
    if shift_labels is None:
        assert labels is not None, "the fused LM head scores targets: labels or shift_labels"
        hidden_states, shift_labels = hidden_states[:, :-1], labels[:, 1:]
    head = model.get_output_embeddings()
    # With a device map the backbone may end on another device.
    hidden_states, shift_labels = (x.to(head.weight.device) for x in (hidden_states, shift_labels))
    mask = shift_labels != IGNORE_INDEX
    with utils.maybe_gather_lm_head_ctx(head.weight, head.bias):
        scored = _Scores.apply(
            hidden_states[mask],
            _whole(head.weight),
            _whole(head.bias),
            shift_labels[mask],
            _logit_scale(config),
            getattr(config, "final_logit_softcapping", None),
        )
    # Scattered, so that a batch without targets has gradients too: other processes wait for them.
    log_probs, entropy, is_top1 = (
        values.new_zeros(mask.shape).masked_scatter(mask, values) for values in scored
    )
    num_items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, aux_loss = -log_probs.sum() / num_items, None
    if kwargs.get("output_router_logits"):
        aux_loss = load_balancing_loss_func(
            outputs.router_logits,
            config.num_experts,
            config.num_experts_per_tok,
            kwargs.get("attention_mask"),
        )
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedOutput(loss, log_probs, entropy, is_top1, mask, aux_loss)


def _whole(weight: Tensor | None) -> Tensor | None:
    """Return a parameter that FSDP2 may have sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _logit_scale(config: PreTrainedConfig) -> float:
    """Return by what a model multiplies its logits, which each family calls otherwise."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return scale
    if (scaling := getattr(config, "logits_scaling", None)) is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


class _Scores(torch.autograd.Function):
    """Log-probability of each target, entropy of its prediction and whether it has the largest one.

    Both ways compute the logits of some tokens at a time, and none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # (targets, hidden)
        weight: Tensor,  # (vocabulary, hidden)
        bias: Tensor | None,  # (vocabulary,)
        targets: Tensor,  # (targets,)
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden_states.device.type
        autocast = torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if autocast else hidden_states.dtype
        ctx.scale, ctx.softcap = scale, softcap
        ctx.save_for_backward(hidden_states, weight, bias, targets)
        scores = []
        for part in _parts(len(targets), len(weight)):
            logits = _logits(ctx, hidden_states[part], weight, bias)
            log_probs = logits.log_softmax(-1)
            scores.append(
                (
                    log_probs.gather(-1, targets[part, None]).squeeze(-1),
                    -(log_probs.exp() * log_probs).sum(-1),
                    logits.argmax(-1) == targets[part],
                )
            )
        log_probs, entropy, is_top1 = map(torch.cat, zip(*scores, strict=True))
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias, targets = ctx.saved_tensors
        with utils.maybe_gather_lm_head_ctx(weight, bias):
            inputs = (hidden_states, weight, bias)
            sums = [
                torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
                if needed
                else None
                for x, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
            ]
            of_hidden, of_weight, of_bias = sums
            for part in _parts(len(targets), len(weight)):
                logits = _logits(ctx, hidden_states[part], weight, bias)
                slope = gradients[0][part, None]  # of the log-probability, then of the logits
                by_logit = logits.softmax(-1).mul_(-slope)
                by_logit.scatter_add_(-1, targets[part, None], slope.to(by_logit.dtype))
                if ctx.softcap is not None:
                    by_logit *= 1 - (logits / ctx.softcap) ** 2
                by_logit *= ctx.scale
                if of_bias is not None:
                    of_bias += by_logit.sum(0)
                by_logit = by_logit.to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[part] = by_logit @ weight.to(ctx.dtype)
                if of_weight is not None:
                    of_weight += by_logit.T @ hidden_states[part].to(ctx.dtype)
        own = (
            None if total is None else total.to(x.dtype)
            for total, x in zip(sums, inputs, strict=True)
        )
        return *own, None, None, None


def _parts(num_targets: int, vocabulary: int) -> list[slice]:
    """Return the targets in pieces, one of them at least."""
    size = max(_LOGITS_AT_ONCE // vocabulary, 1)
    return [slice(begin, begin + size) for begin in range(0, max(num_targets, 1), size)]


def _logits(ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return logits ``(targets, vocabulary)``, of float32 at least."""
    logits = hidden_states.to(ctx.dtype) @ weight.to(ctx.dtype).T
    if bias is not None:
        logits = logits + bias.to(ctx.dtype)
    logits = logits.to(torch.promote_types(ctx.dtype, torch.float32)) * ctx.scale
    return logits if ctx.softcap is None else (logits / ctx.softcap).tanh() * ctx.softcap
