"""Which models can be trained in one pass with images."""

from __future__ import annotations

from transformers import PreTrainedConfig

# By `model_type`. They attend causally to the tokens of images, and one pass is compared with N
# passes for each in tests/training/test_images.py.
_WITH_PLANES = (
    "cosmos3_edge",
    "cosmos3_omni",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)
_WITHOUT_PLANES = (
    "aria",
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "exaone4_5",
    "hyperclovax_vision_v2",
    "idefics3",
    "internvl",
    "janus",
    "kimi_k25",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "minimax_m3_vl",
    "mistral3",
    "muse_glimmer",
    "ovis2",
    "smolvlm",
    "step3p7",
    "video_llama_3",
    "vipllava",
)
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
