"""What a model costs: one product per weight and token, and attention per pair."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from onepass_trl.attention.image_models import layer_sees_image_blocks, sees_image_blocks
from onepass_trl.attention.model_check import check_model, text_model
from onepass_trl.tools.model_class import auto_model

# Cost of forward + backward in units of one forward, without activation checkpointing. A matrix
# product has two in its backward. Attention has two products forward and five backward, as the
# scores are computed again (3.5 with equal head sizes). So are the logits in TRL's fused LM head.
LINEAR_FORWARDS, ATTENTION_FORWARDS, HEAD_FORWARDS = 3.0, 3.5, 4.0
# The names that configurations use for the number of experts per token.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class AttentionLayers:
    """Layers with the same attention.

    Attributes:
        num_layers: how many there are.
        window: their sliding window, None without one.
        flops_per_pair: of one layer's forward, all heads together, for a query and a key it sees.
        sees_blocks: whether they see the tokens of an image in both directions.
    """

    num_layers: int
    window: int | None
    flops_per_pair: int
    sees_blocks: bool = False


@dataclass(frozen=True)
class ModelCost:
    """The floating-point operations of a model's forward pass; a multiply-add counts as two.

    Attributes:
        name: the class of the model.
        num_parameters: all of them, including experts that a token doesn't use.
        linear_flops: per token: projections, MLPs, the experts that it uses, routers, short
            convolutions. The recurrence of a linear attention, a few percent of such a layer, is
            not counted.
        head_flops: per position whose next token is scored.
        attention: per pair of query and key, by kind of layer.
    """

    name: str
    num_parameters: int
    linear_flops: int
    head_flops: int
    attention: tuple[AttentionLayers, ...]


def model_cost(config: PreTrainedConfig) -> ModelCost:
    """Return what the forward pass of a causal language model with this configuration costs.

    The model is built without memory for its weights. Of a multimodal one the operations are those
    of its text model, without its vision tower.

    Raises:
        ValueError: if it can't be built or can't be trained in one pass, see `check_model`.
    """
    try:
        with torch.device("meta"):
            model = auto_model(config).from_config(copy.deepcopy(config))
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"no causal language model can be built from its {type(config).__name__}: "
            f"{str(error).partition(chr(10))[0][:200]}"
        ) from error
    check_model(model)
    text, head = text_model(model), model.get_output_embeddings()
    body = [module for module in text.modules() if module is not head]
    return ModelCost(
        name=type(model).__name__,
        num_parameters=model.num_parameters(),
        linear_flops=2 * sum(_active_weights(module, text.config) for module in body),
        head_flops=2 * head.weight.numel(),
        attention=_attention_layers(text, text.config, sees_image_blocks(config)),
    )


def _active_weights(module: nn.Module, config: PreTrainedConfig) -> int:
    """Return by how many of a module's own weights a token is multiplied."""
    if isinstance(module, nn.Embedding):
        return 0
    total = 0
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim < 2 or name.endswith(("bias", "A_log")):
            continue
        if weight.ndim == 3 and not isinstance(module, nn.Conv1d):  # (experts, .., ..)
            total += weight[0].numel() * _experts_per_token(config)
        else:
            total += weight.numel()
    return total


def _experts_per_token(config: PreTrainedConfig) -> int:
    for name in _EXPERTS_PER_TOKEN:
        if isinstance(number := getattr(config, name, None), int):
            return number
    raise ValueError(
        f"{type(config).__name__} has experts, but none of {', '.join(_EXPERTS_PER_TOKEN)} says "
        "how many of them a token uses: set num_experts_per_tok"
    )


def _attention_layers(
    model: PreTrainedModel, config: PreTrainedConfig, blocks: bool
) -> tuple[AttentionLayers, ...]:
    counts: dict[tuple[int | None, int], int] = {}
    for module in model.modules():
        if not getattr(module, "is_causal", False) or not hasattr(module, "layer_idx"):
            continue
        # Mistral's and Phi-3's layers read it from the configuration.
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        kind = window, 2 * config.num_attention_heads * sum(head_sizes(module, config))
        counts[kind] = counts.get(kind, 0) + 1
    if not counts:
        raise ValueError(f"{type(model).__name__} has no attention layer")
    return tuple(
        AttentionLayers(number, window, flops, blocks and layer_sees_image_blocks(config, window))
        for (window, flops), number in counts.items()
    )


def head_sizes(holder: Any, config: Any) -> tuple[int, int]:
    """Return the sizes of a head of queries and of values.

    Args:
        holder: an attention layer, or a model's text configuration.
        config: the text configuration.
    """
    if has_latent_keys(holder):
        return holder.qk_nope_head_dim + holder.qk_rope_head_dim, holder.v_head_dim
    size = getattr(holder, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, size


def has_latent_keys(holder: Any) -> bool:
    """Whether attention is multi-head latent attention, in which every query head has own keys."""
    return bool(getattr(holder, "qk_nope_head_dim", None))
