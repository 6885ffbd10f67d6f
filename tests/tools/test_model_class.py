"""Verbs load and make the class that training loads."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from onepass_trl.tools.model_class import auto_model


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("qwen3", "Qwen3ForCausalLM", AutoModelForCausalLM),
        ("qwen3", None, AutoModelForCausalLM),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration", AutoModelForImageTextToText),
        ("qwen3_vl", None, AutoModelForImageTextToText),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", AutoModelForImageTextToText),
        ("qwen3_5", "Qwen3_5ForCausalLM", AutoModelForCausalLM),
        ("gemma3", "Gemma3ForConditionalGeneration", AutoModelForCausalLM),  # the same class
        ("clip", "CLIPModel", AutoModelForCausalLM),  # which says why not
    ],
)
def test_the_class_of_the_checkpoint_is_made(model_type, architecture, expected):
    config = AutoConfig.for_model(model_type)
    config.architectures = None if architecture is None else [architecture]
    assert auto_model(config) is expected
