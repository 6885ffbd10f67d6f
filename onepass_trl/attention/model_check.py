"""Which models can be trained in one pass: those that mix tokens by causal attention, or by layers
whose state can branch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from onepass_trl.attention.branching.layers import MIXERS, is_mixer
from onepass_trl.versions import LAYERS_SINCE

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")
# Not token mixers: configurations of hybrid models list these among their layers.
MLP_LAYERS = ("mlp", "moe", "dense", "sparse")
_STATELESS_LAYERS = (*SUPPORTED_LAYERS, *MLP_LAYERS, "attention")
# Modules that carry state along the row, or choose keys by themselves, in models whose
# configuration does not say so. (Kimi Linear's LinearAttention is ordinary attention.)
OTHER_MIXERS = re.compile(
    "Mamba|SSM|Delta(Net|Rule|Attention)|R[Ww][Kk][Vv]|ShortConv|Conv1d|Recurrent|Retention|Hyena|xLSTM|(?<!Kimi)Linear_?Attention|Lightning_?Attention|Indexer"
)

_LAYER = re.compile(r"\.(\d+)(\.|$)")


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        ValueError: it is not a transformers model.
    """
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"model is a {type(base).__name__}, expected a transformers PreTrainedModel or a PEFT "
            "model around one"
        )
    return base


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model through which text goes: the model itself, unless it has encoders
    of images and the like besides a language model."""
    config = model.config.get_text_config(decoder=True)
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.config is config), model)


def check_model(model: nn.Module) -> None:
    """Raise ValueError, naming the layers and the reason, if `model` cannot be trained in one pass.

    Every token mixer of its `text_model` must be causal attention, full or with a sliding window,
    that goes through transformers' attention interface, or a layer of `branching.layers.MIXERS`:
    only these can be told to branch at the nodes of a tree.
    """
    base = base_model(model)
    text = text_model(base)
    config = text.config
    name = type(base).__name__

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{name} cannot be trained in one pass: {reason}")

    if base.config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder, expected a decoder-only model")
    if layers := _unsupported_layers(text, config):
        kinds = "; ".join(f"{kind} in {_layer_list(at)}" for kind, at in layers.items())
        raise refuse(
            f"{kinds}. Such layers do not attend by a mask, so they cannot follow the branches of "
            f"a tree; only {' and '.join(SUPPORTED_LAYERS)} layers can, and of those that carry "
            f"state {', '.join(MIXERS)}"
        )
    for module in text.modules():
        since = LAYERS_SINCE.get(type(module).__name__)
        if is_mixer(module) and since is not None and not since.installed:
            raise refuse(
                f"transformers {transformers.__version__} does not hand visible_end to its layers "
                f"{type(module).__name__}, {since.version} does. Run: pip install "
                f"'transformers>={since.version}'"
            )
    # Models with layers that branch don't all say it of their attention: theirs is tested.
    through_interface = text._supports_attention_backend or any(map(is_mixer, text.modules()))
    if not through_interface or not text._can_set_attn_implementation():
        raise refuse("its attention does not go through transformers' AttentionInterface")
    if getattr(config, "attention_chunk_size", None) and not hasattr(config, "layer_types"):
        raise refuse("its attention is chunked (attention_chunk_size), which is not supported")
    if not getattr(config, "is_causal", True):
        raise refuse("its config says is_causal=False, expected causal attention")
    for key in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        dropout = getattr(config, key, 0.0) or 0.0
        if dropout > 0:
            raise refuse(f"{key} is {dropout}, expected 0: set config.{key} = 0.0")


def check_rotary_embedding(model: nn.Module, max_length: int | None) -> None:
    """Raise ValueError if rotary frequencies would depend on what else is in a row.

    The types "dynamic" and "longrope" choose them by the longest position of the whole batch: a
    short pass in a long row would not get those that it gets alone.

    Args:
        max_length: the longest pass in tokens, None for any length.
    """
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = parameters.values() if "rope_type" not in parameters else [parameters]
    for rope in by_layer:
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        limit = config.max_position_embeddings
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", limit
            )
        if max_length is None or max_length > limit:
            raise ValueError(
                f"{type(base).__name__} has rotary embeddings of type {kind!r}, whose frequencies "
                f"change for the whole row once a position reaches {limit}, so its short turns "
                f"would differ from inference. Set max_length to at most {limit} (got {max_length})"
            )


def carries_state(module: nn.Module) -> bool:
    """Whether the model of an attention layer has other token mixers, as its configuration says."""
    config = getattr(module, "config", None)
    return any(kind not in _STATELESS_LAYERS for kind in _layer_types(config))


def _layer_types(config: PreTrainedConfig | None) -> Sequence[str]:
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()


def _unsupported_layers(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, list[int]]:
    """Return kind -> layer indices, by the configuration if it says, else by class names."""
    kinds: dict[str, list[int]] = defaultdict(list)
    mixers = [f"{path}." for path, module in model.named_modules() if is_mixer(module)]
    branching = {int(layer[1]) for path in mixers if (layer := _LAYER.search(path))}
    for index, kind in enumerate(_layer_types(config)):
        if kind not in _STATELESS_LAYERS and index not in branching:
            kinds[repr(kind)].append(index)
    if kinds:
        return kinds
    for path, module in model.named_modules():
        inside = f"{path}."
        if any(inside.startswith(mixer) or mixer.startswith(inside) for mixer in mixers):
            continue  # a mixer, what lies in it, or what it lies in
        layer = _LAYER.search(path)
        class_name = type(module).__name__
        if layer and OTHER_MIXERS.search(class_name) and int(layer[1]) not in kinds[class_name]:
            kinds[class_name].append(int(layer[1]))
    return {kind: layers for kind, layers in kinds.items() if layers}


def _layer_list(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def reference_attention(model: PreTrainedModel) -> str:
    """Return the causal attention to compare with: SDPA, or eager where that can't softcap."""
    config = model.config.get_text_config()
    softcaps = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not softcaps else "eager"


def check_token_ids(name: str, largest: int, model: Any) -> None:
    """Raise ValueError if a model has no embedding for the largest token id of what `name` says."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and largest >= embeddings.num_embeddings:
        raise ValueError(
            f"{name} has the token id {largest}, but the model has {embeddings.num_embeddings} "
            "embeddings: use the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) first"
        )
