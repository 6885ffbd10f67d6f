"""Tiny random models of every kind of attention, and of layers that carry state, that the package
supports, from configs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from onepass_trl.tools.model_class import AutoModel
from onepass_trl.versions import LAYERS_SINCE

VOCAB_SIZE = 512
# Shorter than a turn of the test conversations, so that windows end inside and across segments.
WINDOW = 5

COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_MAMBA = dict(
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_n_groups=2,
    mamba_chunk_size=16,
)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
)
_TWO_KINDS = dict(layer_types=["linear_attention", "full_attention"])
_LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)

_MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=16, decoder_sparse_step=1, **MOE),
    "mistral": dict(model_type="mistral", sliding_window=WINDOW),
    "gemma2": dict(
        model_type="gemma2",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    ),
    # The last two layers take keys and values of the first two.
    "gemma4": dict(
        model_type="gemma4_text",
        num_hidden_layers=4,
        head_dim=8,  # its scores aren't scaled: with 16 their softmax is sharp, and rounding large
        global_head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        **MOE,
    ),
    "deepseek_v3": dict(
        model_type="deepseek_v3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=24,
        **LATENT,
    ),
    "qwen3_next": dict(
        model_type="qwen3_next",
        head_dim=16,
        **_TWO_KINDS,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=24,
        **_LINEAR,
        **MOE,
    ),
    "qwen3_5": dict(
        model_type="qwen3_5_text",
        head_dim=16,
        **_TWO_KINDS,
        **_LINEAR,
    ),
    "qwen3_5_moe": dict(
        model_type="qwen3_5_moe_text",
        head_dim=16,
        **_TWO_KINDS,
        shared_expert_intermediate_size=24,
        **_LINEAR,
        **MOE,
    ),
    "olmo_hybrid": dict(
        model_type="olmo_hybrid",
        **_TWO_KINDS,
        **_LINEAR,
    ),
    "lfm2": dict(model_type="lfm2", layer_types=["conv", "full_attention"]),
    "lfm3": dict(
        model_type="lfm3",
        layer_types=["conv", "sliding_attention", "full_attention"],
        num_hidden_layers=3,
        head_dim=16,
        sliding_window=WINDOW,
    ),
    "lfm2_moe": dict(
        model_type="lfm2_moe",
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
        **MOE,
    ),
    "nemotron_h": dict(
        model_type="nemotron_h",
        layers_block_type=["linear_attention", "full_attention", "mlp"],
        num_hidden_layers=3,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
    "granitemoehybrid": dict(
        model_type="granitemoehybrid",
        **_TWO_KINDS,
        shared_intermediate_size=24,
        **_MAMBA,
        **MOE,
    ),
    "falcon_h1": dict(model_type="falcon_h1", head_dim=8, mamba_d_ssm=64, **_MAMBA),
    "bamba": dict(model_type="bamba", attn_layer_indices=[1], **_MAMBA),
    "bailing_hybrid": dict(
        model_type="bailing_hybrid",
        **_TWO_KINDS,
        mlp_layer_types=["dense", "sparse"],
        head_dim=8,
        n_group=1,
        topk_group=1,
        q_lora_rank=24,
        **LATENT,
        **MOE,
    ),
    "kimi_linear": dict(
        model_type="kimi_linear",
        **_TWO_KINDS,
        mlp_layer_types=["dense", "sparse"],
        linear_num_heads=4,
        linear_head_dim=8,
        **LATENT,
        **MOE,
    ),
}
_LAYERS = {
    "falcon_h1": "FalconH1Mixer",
    "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv",
    "nemotron_h": "NemotronHMamba2Mixer",
}
MODELS = {
    name: settings
    for name, settings in _MODELS.items()
    if settings["model_type"] in CONFIG_MAPPING
    and (name not in _LAYERS or LAYERS_SINCE[_LAYERS[name]].installed)
}
"""Those that the installed transformers has, and not too old."""


def make_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random float32 model; sinks, biases and norms are random too, so that none can be
    left out unseen."""
    settings = {**COMMON, **_MODELS[name], **overrides}
    return random_model(CONFIG_MAPPING[settings.pop("model_type")](**settings), seed=seed)


def random_model(
    config: PreTrainedConfig, *, seed: int = 0, auto: AutoModel = AutoModelForCausalLM
) -> PreTrainedModel:
    """Return a random float32 model of a configuration, as `make_model` does."""
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("A_log"):
                parameter.sub_(3)  # states that outlast a segment
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 if parameter.ndim == 1 else 0.05)
    return model.eval()
