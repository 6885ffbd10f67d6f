"""A processor's rule for images: the tokens in their places, and the inputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from onepass_trl.passes import ImageSource, ImageSpan

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# What a processor returns of the text.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


# For each processor the tokens of an image by its width, its height and the processor's settings.
_TOKENS: WeakKeyDictionary[Any, dict[tuple[int, int, str], NDArray[np.int32]]] = WeakKeyDictionary()


class ImageError(ValueError):
    """An image that can't be read, or that the processor doesn't take."""


class Vision:
    """What a processor makes of images.

    Attributes:
        placeholder: What chat templates write for an image. The processor puts the image's tokens
            in its place, which may be others.
        around: The texts that the processor writes before and after an image's own tokens, which
            are tokenized with what is next to them.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self._processor = processor
        self.placeholder: str = processor.image_token
        self.around = ("", "")
        # Gemma 3's, in which the placeholder is the first of an image's own tokens.
        if (sequence := getattr(processor, "full_image_sequence", None)) is not None:
            before, _, rest = sequence.partition(self.placeholder)
            self.around = (before, rest.rpartition(processor.tokenizer.eoi_token)[2])

    @property
    def placeholder_id(self) -> int:
        """The id of the placeholder, which must be a token."""
        return int(self._processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    @property
    def merge_size(self) -> int:
        """How many patches of an image, in each direction, are one token."""
        return int(self._processor.image_processor.merge_size)

    def tokens(self, source: ImageSource) -> NDArray[np.int32]:
        """Return the ids that the processor puts in the place of an image's placeholder.

        The image is read, to see that it can be. Its tokens depend on its size alone, so a
        processor with the same settings is asked once for each size.

        Raises:
            ImageError: if the image can't be read, or the processor doesn't take it.
        """
        size = load(source).size
        tokens = _TOKENS.setdefault(self._processor, {})
        key = (*size, repr(vars(self._processor.image_processor)))
        if key not in tokens:
            from PIL import Image

            [ids] = self._process([Image.new("RGB", size)], str(source))["input_ids"]
            tokens[key] = self._own_tokens(np.asarray(ids, dtype=np.int32), source)
        return tokens[key]

    def _own_tokens(self, ids: NDArray[np.int32], source: ImageSource) -> NDArray[np.int32]:
        """Return what comes in the place of a placeholder without the texts `around` it."""
        if not any(self.around):
            return ids
        tokenizer = self._processor.tokenizer
        begins, ends = (
            np.flatnonzero(ids == x) for x in (self.placeholder_id, tokenizer.eoi_token_id)
        )
        if len(begins) != 1:
            raise ImageError(
                f"the processor cuts the image ({source}) into crops with texts between them, "
                "which one-pass training doesn't support: leave do_pan_and_scan off"
            )
        return ids[begins[0] : ends[0] + 1]

    def with_surroundings(self, text: str) -> str:
        """Return a text with what the processor writes around the tokens of images."""
        return text.replace(self.placeholder, self.placeholder.join(self.around))

    def inputs(self, sources: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        """Return what a model gets of images: ``pixel_values``, ``image_grid_thw`` or the like.

        Args:
            sources: the images, at least one, in the order of their tokens in the batch.

        Raises:
            ImageError: if one can't be read, or the processor doesn't take it.
        """
        images = {source: load(source) for source in sources}
        name = ", ".join(map(str, sources))
        outputs = self._process([images[source] for source in sources], name)
        return {key: value for key, value in outputs.items() if key not in _OF_TEXT}

    def token_types(self, token_ids: NDArray[np.int32]) -> dict[str, torch.Tensor]:
        """Return ``mm_token_type_ids``, ``(1, num_tokens)`` int64, if the processor makes them.

        Gemma 3 calls them ``token_type_ids``, as many tokenizers call other things.
        """
        import torch

        processor, name = self._processor, "mm_token_type_ids"
        is_gemma3 = any(self.around)
        if not is_gemma3 and (
            name not in processor.model_input_names
            and not getattr(processor, f"return_{name}", False)
        ):
            return {}
        types = processor.create_mm_token_type_ids([token_ids.tolist()])
        return {"token_type_ids" if is_gemma3 else name: torch.tensor(types)}

    def is_image(self, token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return in which places the model puts the features of images, ``(num_tokens,)``."""
        return np.isin(token_ids, self._processor.image_token_ids)

    def _process(self, images: Sequence[Image], name: str) -> Any:
        text = self.placeholder * len(images)
        try:
            return self._processor(
                images=[list(images)],
                text=[text],
                add_special_tokens=False,
                return_mm_token_type_ids=False,
                return_tensors="pt",
            )
        except ValueError as error:
            raise ImageError(f"the processor doesn't take the image ({name}): {error}") from error


def vision_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> Vision | None:
    """Return what a processor makes of images; None for a tokenizer, and one without images."""
    has_images = getattr(processing_class, "image_processor", None) is not None
    if not has_images or getattr(processing_class, "image_token", None) is None:
        return None
    return Vision(processing_class)


def ordinary_inputs(
    token_ids: NDArray[np.int32],
    images: Sequence[ImageSpan],
    vision: Vision | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Return what an ordinary forward of one pass gets besides its ids: nothing without images.

    The model finds the positions of image tokens by itself, from ``mm_token_type_ids``.

    Args:
        token_ids: ``(num_tokens,)``.
        images: the spans of the pass's images.
        vision: processes them.
        device: of the tensors.
    """
    if not images:
        return {}
    assert vision is not None
    inputs = vision.inputs([span.source for span in images]) | vision.token_types(token_ids)
    return {name: values.to(device) for name, values in inputs.items()}


def load(source: ImageSource) -> Image:
    """Return an image in RGB, upright, as transformers' processors load it.

    Raises:
        ImageError: if it can't be read.
    """
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # which one it has
    from PIL import Image, UnidentifiedImageError
    from transformers.image_utils import load_image

    try:
        if source.is_remote:
            return load_image(source.path)
        content = source.content or Path(source.path or "").read_bytes()
        return load_image(Image.open(BytesIO(content)))
    except (
        OSError,  # missing, truncated, of no known format
        EOFError,
        SyntaxError,  # Pillow's for a broken PNG
        ValueError,
        Image.DecompressionBombError,
        httpx.HTTPError,
        httpx.InvalidURL,
    ) as error:
        reason = str(error)[:300]  # some repeat an image that is in its address
        if isinstance(error, UnidentifiedImageError):  # which names an object in memory
            reason = "it has no image, or one of a format that Pillow doesn't know"
        raise ImageError(f"the image ({source}) can't be read: {reason}") from error
