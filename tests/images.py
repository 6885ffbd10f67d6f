"""Tiny random models that see images, their processors, and conversations with images.

Processors are transformers' own with its Pillow image processors where it has them. Those for
videos need torchvision and are left out where they can be. `make test-images` runs the tests of the
processors that can't be made without it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.utils import is_torchvision_available

from tests.chat.tokenizers import small_tokenizer
from tests.image_families import FAMILIES, QWEN, TOKENS
from tests.models import COMMON


@functools.cache
def image_tokenizer(place: str = QWEN, **names: str) -> PreTrainedTokenizerBase:
    """Return Qwen3.5's small tokenizer and template, with another place of an image.

    Args:
        place: what the template writes for an image.
        **names: tokens with names of their own.
    """
    tokenizer = copy.deepcopy(small_tokenizer("qwen3_5_think"))
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    assert QWEN in tokenizer.chat_template
    template = tokenizer.chat_template.replace(QWEN, place.replace("\n", "\\n"))
    tokenizer.chat_template = template
    return tokenizer


class _WithoutOthers(ProcessorMixin):
    """The base of processors, which doesn't take what isn't there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {name: value for name, value in kwargs.items() if value is not None}
        super().__init__(*args, **given)


def _without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a processor class that needs none of videos, and so no torchvision, nor of audio."""
    others = set(kind.get_attributes()) - {"image_processor", "tokenizer"}

    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any
    ) -> None:
        given = dict(image_processor=image_processor, tokenizer=tokenizer)
        kind.__init__(self, **dict.fromkeys(others), **given, **kwargs)

    return type(kind.__name__, (kind, _WithoutOthers), {"__init__": __init__})


@functools.cache
def make_processor(name: str) -> ProcessorMixin:
    """Return the processor of a model of `FAMILIES`; skip the test if that needs torchvision."""
    family = FAMILIES[name]
    if family.needs_torchvision and not is_torchvision_available():
        pytest.skip("with torchvision: make test-images")
    kind = getattr(transformers, family.processor)
    tokenizer = copy.deepcopy(image_tokenizer(family.place, **family.names))
    settings = {**family.settings, "chat_template": tokenizer.chat_template}
    if family.videos:
        settings["video_processor"] = getattr(transformers, family.videos)()
    elif "video_processor" in kind.get_attributes():
        kind = _without_videos(kind)
    return kind(
        image_processor=get_image_processor_class_from_name(family.images)(**family.resized),
        tokenizer=tokenizer,
        **settings,
    )


def make_image_model(name: str, *, tied: bool = False, **text: Any) -> PreTrainedModel:
    """Return a model of `FAMILIES` with random weights, in float32.

    Args:
        name: its key.
        tied: whether the LM head has the weight of the embeddings.
        **text: further settings of its text configuration.
    """
    processor, family = make_processor(name), FAMILIES[name]
    tokenizer = processor.tokenizer
    common = {**COMMON, "vocab_size": len(tokenizer)}
    if name == "gemma4":  # it embeds an image's tokens as padding too, which trainers make this
        common["pad_token_id"] = tokenizer.pad_token_id
    settings = {**family.config, "text_config": {**common, **family.config["text_config"], **text}}
    if tied:
        settings["tie_word_embeddings"] = True
    config = CONFIG_MAPPING[name](**settings)
    tokens = {"image_token_id": processor.image_token, **family.tokens}
    if getattr(processor, "video_token", None):
        tokens["video_token_id"] = processor.video_token
    for key, token in tokens.items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projector makes all images equal
            torch.nn.init.normal_(parameter, std=0.02)
    return model


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
