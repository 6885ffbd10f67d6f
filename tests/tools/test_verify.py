import pytest
import torch

from onepass_trl.tools import verify
from onepass_trl.tools.verify import compare
from tests.conversations import forked_rollouts, random_chat
from tests.models import make_model


def test_a_comparison_counts_both_sides():
    passes = random_chat(4)
    comparison = compare(make_model("qwen3"), passes)
    assert comparison.num_turns == 4
    assert comparison.num_trained == sum(pass_.num_trained for pass_ in passes)
    assert comparison.n_pass_tokens == sum(map(len, passes))
    assert comparison.one_pass_tokens < comparison.n_pass_tokens
    assert comparison.token_ratio == comparison.n_pass_tokens / comparison.one_pass_tokens
    assert comparison.agrees(1e-6, 1e-4)
    assert not comparison.agrees(1e-12, 1e-12)


def test_a_wrong_row_is_found(monkeypatch):
    """Positions that go on along the row, as in an ordinary packed batch, are not N-pass."""
    linearize = verify.linearize

    def with_row_positions(tree):
        row = linearize(tree)
        row.position_ids[:] = range(len(row))
        return row

    monkeypatch.setattr(verify, "linearize", with_row_positions)
    comparison = compare(make_model("qwen3"), random_chat(3))
    assert not comparison.agrees(1e-4, 1e-2)


def test_the_model_is_left_as_it_was():
    model = make_model("llama").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compare(model, forked_rollouts(2))
    assert model.training
    assert model.config._attn_implementation == "eager"
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_nothing_to_compare_is_an_error():
    passes = random_chat(2)
    model = make_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        compare(model, passes)


def test_a_gradient_that_is_not_a_number_never_agrees():
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert not compare(model, random_chat(2)).agrees(1.0, 1.0)
