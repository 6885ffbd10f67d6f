"""Tiny models whose linear attention fla computes, or whose Mamba 2 mamba-ssm: one pass against a
plain causal forward for each.
"""

from __future__ import annotations

import pytest
import torch
from mamba_ssm.ops.triton import ssd_combined
from torch import Tensor, nn

from onepass_trl.attention.branching import fla_backend
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.data import build_tree, linearize
from onepass_trl.passes import Pass
from tests.conversations import random_chat
from tests.models import make_model

PASSES = random_chat(2, low=2, high=6)


DELTA_RULE, KIMI_RULE = "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"
SCAN = "_mamba_chunk_scan_combined_fwd"
# With which function in how many layers.
MODELS = {
    "qwen3_5": [DELTA_RULE],
    "qwen3_next": [DELTA_RULE],
    "olmo_hybrid": [DELTA_RULE],
    "kimi_linear": [KIMI_RULE],
    "bailing_hybrid": [KIMI_RULE],
    "nemotron_h": [SCAN],
    "granitemoehybrid": [SCAN],
    "falcon_h1": [SCAN, SCAN],
    "bamba": [SCAN],
}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the rules that run along trees by fla, and of all scans by mamba-ssm."""
    names = []

    def note(module, function, name):
        original = getattr(module, function)

        def noting(*args, **options):
            names.append(name or args[0])
            return original(*args, **options)

        monkeypatch.setattr(module, function, noting)

    note(fla_backend, "along_levels", None)
    note(ssd_combined, SCAN, SCAN)
    return names


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def n_pass_loss(model: nn.Module, passes: list[Pass]) -> Tensor:
    total = torch.zeros(())
    for pass_ in passes:
        ids = torch.from_numpy(pass_.token_ids).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits
        trained = torch.from_numpy(pass_.trained[1:])
        total = total - log_probs(logits[:, :-1], ids[:, 1:])[0, trained].sum()
    return total


def one_pass_loss(model: nn.Module, passes: list[Pass]) -> Tensor:
    layout = linearize(build_tree(passes))
    ids, positions, labels = (
        torch.from_numpy(x).long()[None]
        for x in (layout.input_ids, layout.position_ids, layout.shift_labels)
    )
    visible_end = torch.from_numpy(layout.visible_end)[None]
    tree = dict(position_ids=positions, visible_end=visible_end)
    logits = model(ids, use_cache=False, **tree).logits
    return -(log_probs(logits, labels) * torch.from_numpy(layout.weights)).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_is_n_passes(calls, name):
    expected = gradients(model := make_model(name), loss := n_pass_loss(model, PASSES))
    assert calls == [rule for rule in MODELS[name] if rule == SCAN] * len(PASSES)
    calls.clear()
    use_onepass_attention(model)
    one_pass = one_pass_loss(model, PASSES)
    assert calls == MODELS[name]
    torch.testing.assert_close(one_pass, loss, rtol=1e-6, atol=0)
    assert_same(gradients(model, one_pass), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_checkpointed_layers_compute_the_same(calls, name):
    model = make_model(name)
    use_onepass_attention(model)
    expected = gradients(model, one_pass_loss(model, PASSES))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(model, one_pass_loss(model, PASSES))
    assert len(calls) == 3  # the last one within the backward pass
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_a_compiled_model_computes_the_same(calls, name):
    model = make_model(name)
    use_onepass_attention(model)
    expected = gradients(model, one_pass_loss(model, PASSES))
    model.compile(backend="aot_eager")
    assert_same(gradients(model, one_pass_loss(model, PASSES)), expected)
    assert len(calls) == 2
