"""Which models can be trained in one pass with images."""

from __future__ import annotations

from transformers import PreTrainedConfig

# By `model_type`. They attend causally to the tokens of images, and one pass is compared with N
# passes for each in tests/training/test_images.py.
_WITH_PLANES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm4v_moe",
    "glm46v",
)
_WITHOUT_PLANES = ("internvl",)
IMAGE_MODELS = (*_WITH_PLANES, *_WITHOUT_PLANES)


def has_position_planes(config: PreTrainedConfig) -> bool:
    """Return whether rotary embeddings place the tokens of an image in time, height and width."""
    return config.model_type in _WITH_PLANES


def why_no_images(config: PreTrainedConfig) -> str | None:
    """Return why a model can't be trained in one pass on images, None if it can."""
    if config.model_type in IMAGE_MODELS:
        return None
    sees = "isn't proven to train" if hasattr(config, "vision_config") else "doesn't see"
    return (
        f"the model (model_type {config.model_type!r}) {sees} images in one pass, expected one of "
        f"the model types {', '.join(IMAGE_MODELS)}: remove the images, or train with SFTTrainer"
    )
