"""The class of a model, for the verbs and benchmarks that load one or make one."""

from __future__ import annotations

from typing import TypeAlias

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

AutoModel: TypeAlias = "type[AutoModelForCausalLM | AutoModelForImageTextToText]"


def auto_model(config: PreTrainedConfig) -> AutoModel:
    """Return the auto class that makes what training loads: the class that the checkpoint names.

    A configuration without a name is that of a multimodal model if it can be one.
    """
    sees_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    names = config.architectures or [sees_images]
    if sees_images is None or names[0] != sees_images:
        return AutoModelForCausalLM
    only_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return AutoModelForCausalLM if only_text == sees_images else AutoModelForImageTextToText
