"""The fused LM head for older versions of TRL, against the logits of the models themselves."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING

from onepass_trl import versions
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.training import lm_head
from tests.models import COMMON, MOE, VOCAB_SIZE, random_model

MODELS = {
    "llama": {},
    "phi": {},  # a bias
    "gemma2": dict(final_logit_softcapping=5.0, head_dim=16),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0),
    "qwen3_moe": dict(**MOE, head_dim=16, output_router_logits=True, router_aux_loss_coef=0.1),
}


@pytest.fixture(autouse=True)
def old_trl(monkeypatch):
    monkeypatch.setattr(versions, "FUSED_LM_HEAD", versions.Since("trl", "99"))
    monkeypatch.setattr(lm_head, "_LOGITS_AT_ONCE", 3 * VOCAB_SIZE)


def make_model(name):
    model = random_model(CONFIG_MAPPING[name](**COMMON, **MODELS[name]))
    lm_head.add_fused_lm_head(model)
    return model


def batch(seq=9):
    ids = torch.randint(3, VOCAB_SIZE, (2, seq), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(1)
    labels[:, ::3] = IGNORE_INDEX
    return ids, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_loss_of_the_models_own_logits(name):
    model = make_model(name)
    ids, labels = batch()
    plain = model(ids, labels=labels)
    expected = gradients(model, plain.loss)
    fused = model(ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-6, atol=0)
    actual = gradients(model, fused.loss)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (actual[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


def test_every_target_has_its_log_probability_entropy_and_rank():
    model = make_model("gemma2")
    ids, labels = batch()
    labels[0, 1] = model(ids).logits[0, 1].argmax()
    log_probs = model(ids).logits.log_softmax(-1)
    fused = model(ids, shift_labels=labels, fused_lm_head=True)
    mask = labels != IGNORE_INDEX
    assert torch.equal(fused.label_mask, mask)
    loss = cross_entropy(log_probs.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(fused.log_probs, -loss)
    entropy = torch.where(mask, -(log_probs.exp() * log_probs).sum(-1), 0.0)
    torch.testing.assert_close(fused.entropy, entropy)
    assert torch.equal(fused.is_top1, mask & (log_probs.argmax(-1) == labels))
    assert fused.is_top1[0, 1]


def test_a_batch_without_targets_has_a_gradient_of_zero():
    """Other processes wait for it."""
    model = make_model("llama")
    ids, labels = batch()
    fused = model(ids, shift_labels=torch.full_like(labels, IGNORE_INDEX), fused_lm_head=True)
    assert all(not x.any() for x in gradients(model, fused.log_probs.sum()).values())
    assert model.lm_head.weight.grad is not None


def test_a_head_in_bfloat16_is_as_close_as_its_logits():
    model = make_model("llama").bfloat16()
    ids, labels = batch()
    expected = cross_entropy(model(ids).logits.float().transpose(1, 2), labels, reduction="none")
    fused = model(ids, shift_labels=labels, fused_lm_head=True)
    assert fused.log_probs.dtype == torch.float32
    torch.testing.assert_close(fused.log_probs, -expected, rtol=1e-6, atol=1e-6)
