"""Which models can be trained in one pass with images."""

from __future__ import annotations

from typing import TypedDict

from transformers import PreTrainedConfig

# By `model_type`. One pass is compared with N passes for each in tests/training/test_images.py. All
# but the last attend causally to the tokens of images.
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
_WITH_BLOCKS = ("gemma3", "gemma4")
IMAGE_MODELS = (*_WITH_PLANES, *_WITHOUT_PLANES, *_WITH_BLOCKS)


def has_position_planes(config: PreTrainedConfig) -> bool:
    """Return whether rotary embeddings place the tokens of an image in time, height and width."""
    return config.model_type in _WITH_PLANES


def sees_image_blocks(config: PreTrainedConfig) -> bool:
    """Return whether the tokens of an image see each other in both directions."""
    if config.model_type not in _WITH_BLOCKS:
        return False
    # Gemma 4's small models see images causally.
    return config.model_type != "gemma4" or (
        config.get_text_config().use_bidirectional_attention == "vision"
    )


class CollatorOptions(TypedDict):
    """What `OnePassCollator` must know of a model; see there."""

    planes: bool
    blocks: bool


def collator_options(config: PreTrainedConfig) -> CollatorOptions:
    """Return how a model wants rows with images to be collated."""
    return {"planes": has_position_planes(config), "blocks": sees_image_blocks(config)}


def layer_sees_image_blocks(text_config: PreTrainedConfig | None, window: int | None) -> bool:
    """Return whether a layer of a model that sees image blocks does so: Gemma 4's without a window
    are causal."""
    return window is not None or getattr(text_config, "model_type", None) != "gemma4_text"


def why_no_images(config: PreTrainedConfig) -> str | None:
    """Return why a model can't be trained in one pass on images, None if it can."""
    if config.model_type in IMAGE_MODELS:
        return None
    sees = "isn't proven to train" if hasattr(config, "vision_config") else "doesn't see"
    return (
        f"the model (model_type {config.model_type!r}) {sees} images in one pass, expected one of "
        f"the model types {', '.join(IMAGE_MODELS)}: remove the images, or train with SFTTrainer"
    )
