"""Tiny models whose linear attention fla computes: one pass against a plain causal forward each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onepass_trl.attention.branching import fla_backend
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.data import build_tree, linearize
from onepass_trl.passes import Pass
from tests.conversations import random_chat
from tests.models import make_model

PASSES = random_chat(2, low=2, high=6)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the rules that run along trees by fla."""
    names = []
    along_levels = fla_backend.along_levels

    def noting(name, *args, **options):
        names.append(name)
        return along_levels(name, *args, **options)

    monkeypatch.setattr(fla_backend, "along_levels", noting)
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


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("qwen3_5", "torch_chunk_gated_delta_rule"),
        ("qwen3_next", "torch_chunk_gated_delta_rule"),
        ("kimi_linear", "chunk_kimi_delta_attention"),
    ],
)
def test_one_pass_is_n_passes(calls, name, rule):
    expected = gradients(model := make_model(name), loss := n_pass_loss(model, PASSES))
    assert not calls
    use_onepass_attention(model)
    one_pass = one_pass_loss(model, PASSES)
    assert calls == [rule]
    torch.testing.assert_close(one_pass, loss, rtol=1e-6, atol=0)
    assert_same(gradients(model, one_pass), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointed_layers_compute_the_same(calls):
    model = make_model("qwen3_5")
    use_onepass_attention(model)
    expected = gradients(model, one_pass_loss(model, PASSES))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(model, one_pass_loss(model, PASSES))
    assert len(calls) == 3  # the last one within the backward pass
    assert_same(actual, expected)


def test_a_compiled_model_computes_the_same(calls):
    model = make_model("qwen3_5")
    use_onepass_attention(model)
    expected = gradients(model, one_pass_loss(model, PASSES))
    model.compile(backend="aot_eager")
    assert_same(gradients(model, one_pass_loss(model, PASSES)), expected)
    assert len(calls) == 2
