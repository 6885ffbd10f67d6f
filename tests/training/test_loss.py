"""The loss as training computes it, and the models whose loss it would not be."""

import math

import pytest
import torch
from transformers import Cohere2ForCausalLM

from onepass_trl.tools.verify import compare
from onepass_trl.training.loss import check_head, fused_lm_head, target_losses
from tests.conversations import random_chat
from tests.images import make_image_model
from tests.model_coverage import make_tiny_model
from tests.models import MODELS, make_model
from tests.n_pass import make_trainer

REFUSED = {
    "modernbert-decoder": r"it has lm_head\.dense\.weight, lm_head\.norm\.weight.* besides its ba",
    "mllama": "MllamaForCausalLM cannot be trained in one pass: it has no backbone of its own",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_backbone_and_an_lm_head_pass(name):
    check_head(make_model(name))


def test_a_scale_that_the_model_itself_does_not_know_is_refused():
    """As of Command A Vision: a text model with a scale, in a class that doesn't use it."""
    model = make_image_model("aya_vision", logit_scale=0.25)
    with pytest.raises(ValueError, match=r"has logit_scale=0\.25, .* expected the same of both"):
        check_head(model)
    model.config.text_config.logit_scale = 1.0
    check_head(model)
    check_head(make_tiny_model("cohere2"))  # whose own logits have it


def test_a_class_of_one_s_own_scales_logits_as_the_one_that_it_is_made_from():
    class Mine(Cohere2ForCausalLM):
        pass

    check_head(Mine(make_tiny_model("cohere2").config))


def test_adapters_pass_but_on_the_head():
    from peft import LoraConfig, get_peft_model

    def check(**options):
        check_head(get_peft_model(make_model("llama"), LoraConfig(r=2, **options)))

    check(target_modules=["q_proj"])
    check(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="it has an adapter on its LM head"):
        check(target_modules=["q_proj", "lm_head"])


@pytest.mark.filterwarnings("ignore:.*token_id must be")
@pytest.mark.parametrize(("model_type", "message"), REFUSED.items(), ids=REFUSED)
def test_a_model_whose_logits_the_fused_head_would_not_compute_is_refused(
    model_type, message, tmp_path, tiny_tokenizer
):
    model = make_tiny_model(model_type)
    with pytest.raises(ValueError, match=message):
        compare(model, random_chat(1))
    with pytest.raises(ValueError, match=message):
        make_trainer(model, [random_chat(1)], tmp_path, tiny_tokenizer)


def test_a_scale_that_the_fused_head_does_not_know_is_found(monkeypatch):
    """One pass is compared as it is trained, not by the model's own logits."""
    model, passes = make_model("llama"), random_chat(2)
    assert compare(model, passes).agrees(1e-6, 1e-4)
    forward = model.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.5
        return outputs

    monkeypatch.setattr(model, "forward", scaled)
    assert not compare(model, passes).agrees(1e-3, 1e-2)
    assert model.forward is scaled


def test_the_fused_head_is_taken_away():
    model = make_model("llama")
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    with fused_lm_head(model):
        log_probs = model(ids, shift_labels=ids, fused_lm_head=True).log_probs
        assert torch.equal(model(ids).logits, expected)
    torch.testing.assert_close(
        log_probs, expected.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    )
    assert "forward" not in vars(model)
    assert torch.equal(model(ids).logits, expected)


def test_a_target_counts_as_often_as_its_weight_says():
    log_probs = torch.tensor([[-1.0, -2.0, 0.0]])
    weights = torch.tensor([[2.0, 1.0, 0.0]])
    assert target_losses(log_probs, weights).tolist() == [[2, 2, 0]]
    dft = target_losses(log_probs, weights, dft=True)
    torch.testing.assert_close(dft, torch.tensor([[2 * math.exp(-1), 2 * math.exp(-2), 0]]))
