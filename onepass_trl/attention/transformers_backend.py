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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from onepass_trl.attention.api import tree_attention
from onepass_trl.attention.branching.layers import branch_states, layer_name
from onepass_trl.attention.head_exchange import ContextParallel
from onepass_trl.attention.implementations.registry import Impl
from onepass_trl.attention.model_check import base_model, carries_state, check_model
from onepass_trl.attention.remembered import Remembered

__all__ = [
    "DeferredMask",
    "check_model",
    "onepass_attention",
    "register",
    "use_onepass_attention",
    "visible_end_required",
]

NAME = "onepass"
# Attribute of the modules of a model whose layers all follow the tree.
_PREPARED = "_onepass_prepared"

# Of position_ids (int64) the int32 positions of the op, so that layers share them.
_int32_positions: Remembered[Tensor] = Remembered()


_visible_end_required = False


@contextmanager
def visible_end_required() -> Iterator[None]:
    """Make a layer that gets no `visible_end` raise: its model dropped it on the way.

    Such a layer would fall back to plain causal attention over the whole row.
    """
    global _visible_end_required
    before, _visible_end_required = _visible_end_required, True
    try:
        yield
    finally:
        _visible_end_required = before


class DeferredMask:
    """The arguments of `sdpa_mask`, and the mask once a layer without `visible_end` needs it.

    Models build their masks before the first layer, where `visible_end` is not known. Deferring
    them keeps training free of ``(seq, seq)`` tensors.
    """

    # `generate` hands the masks that it prepares for a static cache to the model. By the number of
    # axes transformers tells them from masks of padding, which have two.
    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.window: int | None = arguments.get("local_size")
        self.is_custom: bool = arguments.get("use_vmap", False)
        self._mask: Tensor | None = None
        self._is_built = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_reads_its_mask(name))

    def __getitem__(self, index: Any) -> DeferredMask | Tensor | None:
        """Slice the mask to some queries, as layers that reuse keys do (Gemma 4).

        Such layers need to compute only the last tokens, whose logits are asked for. In training
        these are all, and the mask remains deferred.
        """
        of_queries = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        everything = slice(None)
        if not isinstance(of_queries, slice) or (
            index != (everything, everything, of_queries, everything)
        ):
            raise TypeError(_reads_its_mask(index))
        num_queries = self.arguments["q_length"]
        queries = range(num_queries)[of_queries]
        if len(queries) == num_queries:
            return self
        mask = self.materialize()
        if mask is None and queries == range(num_queries - 1, num_queries):
            return None  # the last token sees all keys
        if mask is None:
            # None would be read as the causal mask of the first queries.
            mask = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        return mask[index]

    def materialize(self) -> Tensor | None:
        """Return the ``(batch, 1, seq, seq)`` bool mask, or None for plain causal attention."""
        if not self._is_built:
            self._mask, self._is_built = sdpa_mask(**self.arguments), True
        return self._mask

    def contiguous(self) -> Tensor | None:
        """Return the mask: before transformers 5.24, `generate` calls this for a static cache."""
        mask = self.materialize()
        return None if mask is None else mask.contiguous()


def _reads_its_mask(what: object) -> str:
    return (
        f"the model reads {what!r} of its attention mask, which one-pass attention replaces by "
        "visible_end: models that compute with the mask themselves can't be trained in one pass"
    )


def onepass_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **kwargs: Any,
) -> DeferredMask | Tensor | None:
    """Return a `DeferredMask`, or with cached keys (so without a tree) the mask of "sdpa"."""
    prepared = kwargs.get("attention_mask")
    if isinstance(prepared, DeferredMask):
        return prepared
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        **kwargs,
    }
    # A static cache counts with tensors: their values may not be read while compiling.
    is_static = isinstance(q_offset, Tensor)
    if is_static or q_length != kv_length or q_offset != 0 or kv_offset != 0:
        num_sharing: int = getattr(kwargs.get("config"), "num_kv_shared_layers", 0)
        if q_length > 1 and num_sharing > 0:
            # None can't be sliced, see `DeferredMask.__getitem__`; a static cache has unused keys.
            arguments["allow_is_causal_skip"] = False
        return sdpa_mask(**arguments)
    return DeferredMask(arguments)


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
        attention_impl: implementation of `tree_attention`.
        context_parallel: if rows are divided among several processes. Then `seq` above is that of
            the piece, but `visible_end` is ``(batch, seq * processes)``, of whole rows.
        **kwargs: what else the model passes, handed on to "sdpa" without `visible_end`.

    Raises:
        ValueError: the layer asks for something that the one rule does not cover.
    """
    if visible_end is None:
        _check_not_required(module)
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
    if context_parallel is not None:
        pieces = [x.transpose(1, 2) for x in (query, key, value)]
        whole = context_parallel.to_whole_rows(layer_name(module), *pieces)
        query, key, value = [x.transpose(1, 2) for x in whole]
        position_ids = context_parallel.position_ids
        s_aux = None if s_aux is None else context_parallel.own_share(s_aux)
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
        impl=attention_impl,
    )
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if context_parallel is not None:
        return context_parallel.to_own_piece(out), None
    return out.contiguous(), None


def _check_not_required(module: nn.Module) -> None:
    if _visible_end_required:
        raise ValueError(
            f"{layer_name(module)} got no visible_end: the model doesn't hand what it gets on to "
            "this layer, so it can't be trained in one pass. Use SFTTrainer with one row per turn"
        )


def _before_mixer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Withhold the mask of padding from a layer that follows `visible_end`."""
    if kwargs.get("visible_end") is None:
        _check_not_required(module)
        return None
    # By its type: its name is "cache", and before transformers 5.24 one of several others.
    if any(isinstance(argument, Cache) for argument in (*args, *kwargs.values())):
        raise ValueError(
            f"{layer_name(module)} got a cache: visible_end describes a whole row, so pass "
            "use_cache=False and no cache with it"
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{layer_name(module)} got {name} and visible_end: pass only visible_end, which "
                "says where packed sequences begin too"
            )
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    batch, seq = hidden_states.shape[:2]
    if (context_parallel := kwargs.get("context_parallel")) is not None:
        seq *= context_parallel.size
    if (shape := tuple(kwargs["visible_end"].shape)) != (batch, seq):
        raise ValueError(
            f"{layer_name(module)}: visible_end has shape {shape}, expected (batch, seq) "
            f"{(batch, seq)}"
        )
    return args, {**kwargs, "attention_mask": None}


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
            "with onepass_trl.attention.transformers_backend.use_onepass_attention(model)"
        )

    if key.shape[2] != query.shape[2]:
        raise refuse(
            f"{key.shape[2]} keys for {query.shape[2]} queries: visible_end describes a whole row, "
            "so pass no cache (past_key_values) with it, nor a number as logits_to_keep"
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


def use_onepass_attention(model: nn.Module) -> None:
    """Switch a model (or the model inside a PEFT wrapper) to "onepass", after `check_model`.

    Raises:
        ValueError: the model cannot be trained in one pass.
    """
    check_model(model)
    register()
    base = base_model(model)
    base.set_attn_implementation(NAME)
    for module in base.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
            raise ValueError(
                f"{type(module).__name__} keeps "
                f"attn_implementation={module.config._attn_implementation!r}, expected {NAME!r}: "
                "its attention cannot be replaced"
            )
    branch_states(base, _before_mixer)
    for module in base.modules():
        setattr(module, _PREPARED, True)


register()
