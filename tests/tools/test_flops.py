"""The cost of a model against what is counted while it runs."""

import dataclasses
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig

from onepass_trl.attention.branching.layers import is_mixer
from onepass_trl.tools.flops import model_cost
from tests.models import MODELS, VOCAB_SIZE, make_model

SEQ = 24


@pytest.fixture
def recorded():
    """What attention functions are given, layer by layer."""
    calls = []

    def record(module, query, key, value, mask, sliding_window=None, **_):
        calls.append((sliding_window, query.shape[1], query.shape[-1], value.shape[-1]))
        return query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None

    AttentionInterface.register("recorded", record)
    return calls


@pytest.fixture
def without_state(monkeypatch):
    """Returns a function that makes the layers of a model which carry state give zeros."""

    def like(x, *_, **__):
        return torch.zeros_like(x)

    def of_values(query, key, value, **__):
        return torch.zeros_like(value), None

    def replace(model):
        for modeling in {sys.modules[type(m).__module__] for m in model.modules() if is_mixer(m)}:
            monkeypatch.setattr(modeling, "causal_conv1d_fn", like)
            for name, function in [
                ("torch_chunk_gated_delta_rule", of_values),
                ("chunk_kimi_delta_attention", of_values),
                ("mamba2_chunk_scan", like),
            ]:
                if hasattr(modeling, name):
                    monkeypatch.setattr(modeling, name, function)

    return replace


@pytest.mark.parametrize("name", MODELS)
def test_cost_is_what_is_counted(name, recorded, without_state):
    """No attention, recurrence or convolution is computed in the counted run, so what is counted is
    linear."""
    model = make_model(name)
    cost = model_cost(model.config)
    without_state(model)
    model.set_attn_implementation("recorded")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others are not counted
    ids = torch.arange(SEQ)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv1d))
    expected = SEQ * (cost.linear_flops - 2 * convolutions + cost.head_flops)
    rotary = 2 * SEQ * model.config.hidden_size  # frequencies times positions: no weights
    assert expected <= counter.get_total_flops() <= expected + rotary
    assert cost.head_flops == 2 * VOCAB_SIZE * model.config.hidden_size
    assert cost.num_parameters == model.num_parameters()

    layers = Counter()
    for window, heads, d_qk, d_v in recorded:
        layers[window, 2 * heads * (d_qk + d_v)] += 1
    assert layers == {(a.window, a.flops_per_pair): a.num_layers for a in cost.attention}


def test_models_that_cannot_be_trained_are_refused():
    config = AutoConfig.for_model(
        "mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4
    )
    with pytest.raises(ValueError, match="cannot be trained in one pass"):
        model_cost(config)


def test_of_a_multimodal_model_only_what_reads_text_counts():
    text = make_model("gemma3").config
    whole = AutoConfig.for_model("gemma3", text_config=text.to_dict())
    cost, of_text = model_cost(whole), model_cost(text)
    assert cost.name == "Gemma3ForConditionalGeneration"
    assert cost.num_parameters > of_text.num_parameters
    assert all(layers.sees_blocks for layers in cost.attention)
    attention = tuple(dataclasses.replace(layer, sees_blocks=False) for layer in cost.attention)
    same = dict(name=of_text.name, num_parameters=of_text.num_parameters, attention=attention)
    assert dataclasses.replace(cost, **same) == of_text


def test_a_configuration_of_which_no_model_can_be_built():
    with pytest.raises(ValueError, match="no causal language model can be built from its CLIPC"):
        model_cost(AutoConfig.for_model("clip"))


def test_large_models_cost_no_memory():
    config = AutoConfig.for_model("qwen3", hidden_size=8192, num_hidden_layers=80)
    cost = model_cost(config)
    assert cost.num_parameters > 4e10
