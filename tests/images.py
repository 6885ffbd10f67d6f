"""Tiny random models that see images, their processors, and conversations with images.

Processors are transformers' own with its Pillow image processors. Those for videos need torchvision
and are left out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    Glm46VProcessor,
    InternVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.chat.tokenizers import small_tokenizer
from tests.models import COMMON, MOE

PATCH, MERGE = 4, 2  # pixels; patches in each direction that are one token
_SIZES = dict(size={"shortest_edge": 64, "longest_edge": 4096}, patch_size=PATCH, merge_size=MERGE)
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
_GLM = "<|begin_of_image|><|image|><|end_of_image|>"
_INTERNVL = "<IMG_CONTEXT>\n"
_TOKENS = (
    "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <|begin_of_image|> "
    "<|end_of_image|> <|image|> <|begin_of_video|> <|end_of_video|> <|video|> <img> </img> "
    "<IMG_CONTEXT> <video> <|reserved|>"
)
_INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# Of the three planes of positions together half a head.
_MROPE = dict(
    head_dim=16,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
)
_QWEN2 = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
_GLM_MROPE = dict(
    head_dim=16,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2], partial_rotary_factor=0.5
    ),
)
_TOWER = dict(depth=2, num_heads=4, hidden_size=32, intermediate_size=48, patch_size=PATCH)
_QWEN3_TOWER = dict(
    **_TOWER, spatial_merge_size=MERGE, out_hidden_size=32, num_position_embeddings=64
)
_GLM_TOWER = dict(
    **_TOWER, spatial_merge_size=MERGE, out_hidden_size=32, image_size=32, rms_norm_eps=1e-5
)

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_vl": dict(
        text_config=_QWEN2,
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=PATCH, mlp_ratio=2
        ),
    ),
    "qwen2_5_vl": dict(
        text_config=_QWEN2,
        vision_config=dict(
            **_TOWER, out_hidden_size=32, fullatt_block_indexes=[1], window_size=4 * PATCH
        ),
    ),
    "qwen3_vl": dict(
        text_config=_MROPE, vision_config=dict(**_QWEN3_TOWER, deepstack_visual_indexes=[0, 1])
    ),
    "qwen3_vl_moe": dict(
        text_config=dict(**_MROPE, **MOE, decoder_sparse_step=1),
        vision_config=dict(**_QWEN3_TOWER, deepstack_visual_indexes=[0]),
    ),
    "qwen3_5": dict(
        text_config=dict(**_MROPE, **_LINEAR),
        vision_config=_QWEN3_TOWER,
    ),
    "qwen3_5_moe": dict(
        text_config=dict(**_MROPE, **_LINEAR, **MOE, shared_expert_intermediate_size=24),
        vision_config=_QWEN3_TOWER,
    ),
    "glm4v": dict(text_config=_GLM_MROPE, vision_config=_GLM_TOWER),
    "glm4v_moe": dict(
        text_config=dict(
            **_GLM_MROPE,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
        vision_config=_GLM_TOWER,
    ),
    "glm46v": dict(
        text_config=dict(model_type="glm4v_text", **_GLM_MROPE),
        vision_config=dict(model_type="glm4v_vision", **_GLM_TOWER),
    ),
    "internvl": dict(
        text_config=dict(model_type="qwen3", head_dim=16),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[16, 16],
            patch_size=[PATCH, PATCH],
        ),
    ),
}
"""The settings of each family's configuration, beyond what all have."""


@functools.cache
def image_tokenizer(place: str = _QWEN, **names: str) -> PreTrainedTokenizerBase:
    """Return Qwen3.5's small tokenizer and template, with another place of an image.

    Args:
        place: what the template writes for an image.
        **names: tokens with names of their own.
    """
    tokenizer = copy.deepcopy(small_tokenizer("qwen3_5_think"))
    tokenizer.add_special_tokens({"additional_special_tokens": _TOKENS.split()})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    assert _QWEN in tokenizer.chat_template
    template = tokenizer.chat_template.replace(_QWEN, place.replace("\n", "\\n"))
    tokenizer.chat_template = template
    return tokenizer


def _without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a processor class that needs no processor of videos, and so no torchvision."""

    def __init__(
        self: Any,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        kind.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    return type(kind.__name__, (kind,), {"__init__": __init__})


def _qwen_processor(kind: type[ProcessorMixin]) -> ProcessorMixin:
    return _made(kind, Qwen2VLImageProcessorPil(**_SIZES), image_tokenizer())


def _made(
    kind: type[ProcessorMixin], images: Any, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> ProcessorMixin:
    template = tokenizer.chat_template
    return _without_videos(kind)(images, tokenizer, chat_template=template, **kwargs)


_PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "qwen2_vl": lambda: _qwen_processor(Qwen2VLProcessor),
    "qwen2_5_vl": lambda: _qwen_processor(Qwen2_5_VLProcessor),
    "qwen3": lambda: _qwen_processor(Qwen3VLProcessor),
    "glm": lambda: _made(Glm46VProcessor, Glm46VImageProcessorPil(**_SIZES), image_tokenizer(_GLM)),
    "internvl": lambda: _made(
        InternVLProcessor,
        GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=3),
        image_tokenizer(_INTERNVL, **_INTERNVL_NAMES),
        image_seq_length=4,
    ),
}


@functools.cache
def make_processor(name: str) -> ProcessorMixin:
    """Return the processor of a model of `MODELS`."""
    return next(make for start, make in _PROCESSORS.items() if name.startswith(start))()


def make_image_model(name: str, **text: Any) -> PreTrainedModel:
    """Return a model of `MODELS` with random weights, in float32.

    Args:
        name: its key.
        **text: further settings of its text configuration.
    """
    processor = make_processor(name)
    settings = MODELS[name]
    tokenizer = processor.tokenizer
    common = {**COMMON, "vocab_size": len(tokenizer)}
    config = CONFIG_MAPPING[name](
        text_config={**common, **settings["text_config"], **text},
        vision_config=settings["vision_config"],
        image_token_id=processor.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids(processor.video_token),
        **({"image_seq_length": 4, "downsample_ratio": 0.5} if name == "internvl" else {}),
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).float().eval()


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


A, B, C, D = make_image(40, 24), make_image(16, 16, 1), make_image(24, 48, 2), make_image(17, 33, 3)
_LOOK = [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]


def part(image: Any) -> dict[str, Any]:
    """Return a content part with an image."""
    return {"type": "image", "image": image}


def text(words: str) -> dict[str, Any]:
    """Return a content part with text."""
    return {"type": "text", "text": words}


def answer(words: str, **more: Any) -> dict[str, Any]:
    """Return an assistant's message with reasoning, which Qwen3.5 drops after the next question."""
    return {"role": "assistant", "content": words, "reasoning_content": f"Think: {words}", **more}


CHATS: dict[str, list[dict[str, Any]]] = {
    "four turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part(A), text("What is it?")]},
        answer("A cat."),
        {"role": "user", "content": "Sure?"},
        answer("Yes."),
        {"role": "user", "content": [text("And "), part(B), text(" against "), part(C)]},
        answer("Dogs."),
        {"role": "user", "content": [part(D)]},
        answer("A fish."),
    ],
    "same image twice": [
        {"role": "user", "content": [part(A), part(A), text("Same?")]},
        answer("Yes."),
        {"role": "user", "content": [part(A), text("Again?")]},
        answer("Yes, again."),
    ],
    "tool result": [
        {"role": "user", "content": "Look at it."},
        answer("", tool_calls=_LOOK),
        {"role": "tool", "content": [text("seen: "), part(C)]},
        answer("A tower."),
        {"role": "user", "content": [part(B), text("And this?")]},
        answer("A door."),
    ],
}
"""Conversations with one to four images of different sizes."""
