"""Models that cannot be trained in one pass are refused with the layers and the reason."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from onepass_trl.attention.transformers_backend import check_model, use_onepass_attention

from ..models import MODELS, make_model

COMMON = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

REFUSED = {
    "minimax": ({"num_local_experts": 2}, r"'linear_attention' in layers 1, 3\. Such layers"),
    "llama4_text": ({"num_local_experts": 2}, "'chunked_attention' in layers 0, 1, 2"),
    "mamba": ({"state_size": 4}, "'linear_attention' in layers 0, 1, 2, 3"),
    "rwkv": ({}, r"RwkvBlock in layers 0, 1, 2, 3"),
    "zamba2": (
        {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_headdim": 16},
        "in layers 0",
    ),
    "recurrent_gemma": ({"lru_width": 32, "block_types": ["recurrent", "attention"]}, "in layers"),
}


@pytest.mark.parametrize("name", MODELS)
def test_supported_models_pass(name):
    check_model(make_model(name))


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_token_mixers_are_named(model_type):
    settings, message = REFUSED[model_type]
    config = CONFIG_MAPPING[model_type](**{**COMMON, **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"cannot be trained in one pass: .*{message}"):
        check_model(model)


def test_encoder_decoder_is_refused():
    config = CONFIG_MAPPING["t5"](vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1)
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_model(AutoModelForSeq2SeqLM.from_config(config))


def test_attention_outside_the_interface_is_refused():
    config = CONFIG_MAPPING["bloom"](vocab_size=32, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="does not go through transformers' AttentionInterface"):
        check_model(AutoModelForCausalLM.from_config(config))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1, expected 0"):
        check_model(make_model("llama", attention_dropout=0.1))


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="model is a Linear, expected a transformers"):
        check_model(nn.Linear(1, 1))


def test_model_inside_a_peft_wrapper_is_switched():
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    use_onepass_attention(wrapped)
    assert model.config._attn_implementation == "onepass"
    assert model.model.config._attn_implementation == "onepass"
