"""Tree attention as the attention implementation "onepass" of transformers.

Importing this module registers it. `use_onepass_attention` switches a model over; then

    model(input_ids, position_ids=position_ids, visible_end=visible_end)

runs every attention layer by the one rule, and `visible_end` alone decides what is seen (an
`attention_mask` of padding is not read: padding is a subtree of its own). Layers that carry state
along the row branch it (`branching`). Without `visible_end`, as in generation, the model computes
what it computes with "sdpa", or with "eager" where its attention has a softcap or sinks, which SDPA
lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from onepass_trl.attention.api import tree_attention
from onepass_trl.attention.branching.layers import branch_states
from onepass_trl.attention.deferred_mask import DeferredMask, onepass_mask
from onepass_trl.attention.head_exchange import ContextParallel
from onepass_trl.attention.image_models import layer_sees_image_blocks
from onepass_trl.attention.implementations.registry import Impl
from onepass_trl.attention.layer_inputs import check_not_required, layer_name
from onepass_trl.attention.model_check import base_model, carries_state, check_model
from onepass_trl.attention.remembered import Remembered
from onepass_trl.wording import counted

__all__ = [
    "check_model",
    "onepass_attention",
    "register",
    "set_attention",
    "use_onepass_attention",
]

NAME = "onepass"
# Attribute of the modules of a model whose layers all follow the tree.
_PREPARED = "_onepass_prepared"

# Of position_ids (int64) the int32 positions of the op, so that layers share them.
_int32_positions: Remembered[Tensor] = Remembered()


def onepass_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DeferredMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    visible_end: Tensor | None = None,
    visible_begin: Tensor | None = None,
    attention_impl: Impl = "auto",
    context_parallel: ContextParallel | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return ``(out, None)``, out ``(batch, seq, heads, d_v)``, as attention functions do.

    Args:
        module: the attention layer, for its name, configuration and training mode.
        query: ``(batch, heads, seq, d_qk)``.
        key: ``(batch, kv_heads, seq, d_qk)``.
        value: ``(batch, kv_heads, seq, d_v)``.
        attention_mask: what `onepass_mask` returned for this layer.
        dropout: must be 0 with `visible_end`.
        scaling: factor of the scores.
        is_causal: must not be False with `visible_end`.
        position_bias: must be None with `visible_end`.
        sliding_window: window of this layer, in positions.
        softcap: cap of the scores.
        s_aux: ``(heads,)``, one sink per head.
        position_ids: ``(batch, seq)`` or ``(1, seq)``, with any leading axes; needed with a window.
        visible_end: ``(batch, seq)`` int32, or None to compute what "sdpa" or "eager" would.
        visible_begin: ``(batch, seq)`` int32, of rows with blocks that see themselves in both
            directions; None without.
        attention_impl: implementation of `tree_attention`.
        context_parallel: if rows are divided among several processes. Then `seq` above is that of
            the piece, but `visible_end` is ``(batch, seq * processes)``, of whole rows.
        **kwargs: what else the model passes, handed on to "sdpa" without `visible_end`.

    Raises:
        ValueError: the layer asks for something that the one rule does not cover.
    """
    if visible_end is None:
        check_not_required(module)
        mask = attention_mask
        if isinstance(mask, DeferredMask):
            mask = mask.materialize()
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                **kwargs,
            )
        return _eager_attention(module, query, key, value, mask, dropout, scaling, softcap, s_aux)
    _check_layer(
        module, query, key, attention_mask, dropout, is_causal, position_bias, sliding_window
    )
    if context_parallel is not None and visible_begin is not None:
        raise ValueError(
            f"one-pass attention in {layer_name(module)}: visible_begin is of whole rows, and "
            "cp_size > 1 divides rows of text only: set cp_size to 1, or remove the images"
        )
    if context_parallel is not None:
        pieces = [x.transpose(1, 2) for x in (query, key, value)]
        whole = context_parallel.to_whole_rows(layer_name(module), *pieces)
        query, key, value = [x.transpose(1, 2) for x in whole]
        position_ids = context_parallel.position_ids
        s_aux = None if s_aux is None else context_parallel.own_share(s_aux)
    if not layer_sees_image_blocks(getattr(module, "config", None), sliding_window):
        visible_begin = None
    positions = None
    if sliding_window is not None:
        positions = _positions(module, position_ids, visible_end)
    out = tree_attention(
        query,
        key,
        value,
        visible_end,
        scale=scaling,
        positions=positions,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        visible_begin=visible_begin,
        impl=attention_impl,
    )
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if context_parallel is not None:
        return context_parallel.to_own_piece(out), None
    return out.contiguous(), None


def _check_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: DeferredMask | Tensor | None,
    dropout: float,
    is_causal: bool | None,
    position_bias: Tensor | None,
    sliding_window: int | None,
) -> None:
    """Raise ValueError if this call is not causal attention by the one rule."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"one-pass attention in {layer_name(module)}: {what}")

    if not getattr(module, _PREPARED, False) and carries_state(module):
        raise refuse(
            "the model has other layers, whose state would run from branch to branch: switch it "
            "with onepass_trl.use_onepass_attention(model)"
        )

    if key.shape[2] != query.shape[2]:
        raise refuse(
            f"{counted(key.shape[2], 'key')} for "
            f"{counted(query.shape[2], 'query', 'queries')}: visible_end describes a whole row, so "
            "pass no cache (past_key_values) with it, nor a number as logits_to_keep"
        )
    if dropout > 0 and module.training:
        raise refuse(
            f"dropout is {dropout}, expected 0: set attention_dropout=0.0 in the model's config"
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise refuse("the layer is not causal, and visible_end describes causal attention")
    if position_bias is not None:
        raise refuse("position_bias changes the scores, which this attention does not support")
    if isinstance(attention_mask, Tensor):
        raise refuse(
            f"a mask of shape {tuple(attention_mask.shape)} and visible_end: pass only one of the "
            "two"
        )
    if attention_mask is not None and attention_mask.is_custom:
        raise refuse(
            "the model adds its own rule to the causal mask, which visible_end would replace"
        )
    if attention_mask is not None and attention_mask.window != sliding_window:
        raise refuse(
            f"its mask has a window of {attention_mask.window}, but its attention is told "
            f"{sliding_window} (sliding_window): chunked attention is not supported, and a window "
            "must be passed to the attention function"
        )
    if sliding_window is None and _layer_type(module) == "sliding_attention":
        raise refuse("a sliding_attention layer passes no sliding_window to its attention function")


def _layer_type(module: nn.Module) -> str | None:
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    layer_idx = getattr(module, "layer_idx", None)
    if layer_types is None or layer_idx is None or layer_idx >= len(layer_types):
        return None
    return layer_types[layer_idx]


def _positions(module: nn.Module, position_ids: Tensor | None, visible_end: Tensor) -> Tensor:
    """Return position ids as ``(batch, seq)`` int32, the same tensor for all layers of a pass."""
    if position_ids is None:
        raise ValueError(
            f"one-pass attention in {layer_name(module)}: its window is measured in positions, "
            "and got none: pass position_ids to the model"
        )
    if position_ids.dtype == torch.int32:
        return _cast_positions(position_ids, visible_end)
    return _int32_positions.get(
        position_ids, (), visible_end.shape, lambda: _cast_positions(position_ids, visible_end)
    )


def _cast_positions(position_ids: Tensor, visible_end: Tensor) -> Tensor:
    # Multimodal rotary embeddings have one plane per axis; the first one counts tokens.
    if position_ids.ndim > 2:
        position_ids = position_ids.reshape(-1, *position_ids.shape[-2:])[0]
    return position_ids.to(torch.int32).expand(visible_end.shape)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, None]:
    """Return what eager attention of Gemma 2 (softcap) and gpt-oss (sinks) returns."""
    group = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, group), repeat_kv(value, group)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and query.shape[2] > 1:  # what "sdpa" leaves to its flag is_causal
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores + torch.where(mask, 0.0, lowest).to(scores.dtype)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = probabilities[..., : key.shape[2]]
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


def register() -> None:
    """Register "onepass" with transformers' interfaces; done on import, harmless to repeat."""
    attention: Callable[..., Any] = onepass_attention
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, onepass_mask)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention implementation of a model that generates text.

    Encoders of images and the like keep theirs; those that had "onepass", which is for text, get
    "sdpa", or "eager" where they have no SDPA.
    """
    encoders = _encoder_configs(model)
    own = {name: config._attn_implementation for name, config in encoders.items()}
    model.set_attn_implementation(
        {
            "": implementation,
            **dict.fromkeys(model.config.sub_configs, implementation),
            **{name: None if before == NAME else before for name, before in own.items()},
        }
        if encoders
        else implementation
    )


def _encoder_configs(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """Return the configurations of a model's encoders by name, none for a model of text alone."""
    config = model.config
    parts = {name: getattr(config, name) for name in config.sub_configs}
    text = config.get_text_config(decoder=True)
    if not any(part is text for part in parts.values()):
        return {}
    return {name: part for name, part in parts.items() if part is not None and part is not text}


def use_onepass_attention(model: nn.Module) -> None:
    """Switch a model (or the model inside a PEFT wrapper) to "onepass", after `check_model`.

    Raises:
        ValueError: the model cannot be trained in one pass.
    """
    check_model(model)
    register()
    base = base_model(model)
    set_attention(base, NAME)
    encoders = {id(config) for config in _encoder_configs(base).values()}
    for module in base.modules():
        if (
            isinstance(module, PreTrainedModel)
            and id(module.config) not in encoders
            and module.config._attn_implementation != NAME
        ):
            raise ValueError(
                f"{type(module).__name__} cannot be trained in one pass: it keeps "
                f"attn_implementation={module.config._attn_implementation!r}, expected {NAME!r}: "
                "its attention cannot be replaced"
            )
    branch_states(base)
    for module in base.modules():
        setattr(module, _PREPARED, True)


register()
