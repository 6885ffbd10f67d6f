"""Images of conversations: the forms in which they are given, and the places where they belong."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.passes import ImageSource, ImageSpan, is_address
from onepass_trl.wording import counted

IMAGE_COLUMNS = ("image", "images")
_PAYLOADS = ("image", "path", "url", "base64", "bytes")  # keys of a part that say which image it is
_FORMS = (
    "a PIL image, a path, a URL, the bytes of an image file, or {'bytes': .., 'path': ..} as "
    "datasets stores images"
)
_EXACT_MODES = ("L", "RGB", "RGBA")  # of PIL, which a PNG keeps


class ImageContent(str):
    """The content of a message with images: its text.

    Attributes:
        parts: Its texts and images, in order.
    """

    parts: tuple[str | ImageSource, ...]

    def __new__(cls, parts: Iterable[str | ImageSource]) -> ImageContent:
        """Return the content that has these parts."""
        parts = tuple(parts)
        content = super().__new__(cls, "\n".join(part for part in parts if isinstance(part, str)))
        content.parts = parts
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageContent, (self.parts,)

    @property
    def images(self) -> list[ImageSource]:
        """The images, in order."""
        return [part for part in self.parts if isinstance(part, ImageSource)]

    def for_template(self) -> list[dict[str, str]]:
        """Return the parts as chat templates take them."""
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in self.parts
        ]


def images_of(messages: Iterable[Mapping[str, Any]]) -> list[ImageSource]:
    """Return the images of messages in their normal form, in order."""
    contents = (message["content"] for message in messages)
    return [
        image
        for content in contents
        if isinstance(content, ImageContent)
        for image in content.images
    ]


def is_image_part(part: Any) -> bool:
    """Return whether a part of a content is an image, or a placeholder of one."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def source_of(part: Mapping[str, Any]) -> ImageSource | None:
    """Return the image of a part of a content, None if it is only a placeholder.

    Raises:
        ChatFormatError: if it has several, or one that can't be understood.
    """
    given = [key for key in _PAYLOADS if part.get(key) is not None]
    if len(given) > 1:
        raise ChatFormatError(f"it has {' and '.join(map(repr, given))}; keep one of them")
    if not given:
        return None
    [key] = given
    if key == "base64":
        try:
            return ImageSource(content=base64.b64decode(part[key], validate=True))
        except (binascii.Error, TypeError, ValueError) as error:
            raise ChatFormatError(f"its 'base64' can't be decoded: {error}") from error
    return image_source(part[key])


def image_source(image: Any) -> ImageSource:
    """Return where an image is that is given in any form.

    An image in memory becomes a PNG, which keeps it exactly.

    Raises:
        ChatFormatError: for any other form, and for a path without a file.
    """
    if isinstance(image, ImageSource):
        return image
    if isinstance(image, Mapping) and image.keys() <= {"bytes", "path"}:
        image = image.get("bytes") or image.get("path")
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, (bytes, bytearray)) and image:
        return ImageSource(content=bytes(image))
    if isinstance(image, str) and is_address(image):
        return ImageSource(path=image)
    if isinstance(image, str) and image:
        if not os.path.isfile(image):
            raise ChatFormatError(f"there is no file {image[:200]!r}")
        return ImageSource(path=os.path.abspath(image))
    if _is_pil_image(image):
        return ImageSource(content=_png(image))
    raise ChatFormatError(f"an image is {type(image).__name__}, expected {_FORMS}")


def _is_pil_image(image: Any) -> bool:
    return any(kind.__module__.startswith("PIL.") for kind in type(image).__mro__)


def _png(image: Any) -> bytes:
    image = image.copy() if image.mode in _EXACT_MODES else image.convert("RGB")
    image.info = {}  # what would turn it when it is read again
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def record_images(record: Mapping[str, Any]) -> list[ImageSource]:
    """Return the images in a record's column ``image`` or ``images``.

    Raises:
        ChatFormatError: if it has both, or one that can't be understood; it names the image.
    """
    given = [column for column in IMAGE_COLUMNS if record.get(column) is not None]
    if not given:
        return []
    if len(given) > 1:
        raise ChatFormatError("the row has columns 'image' and 'images'; keep one of them")
    images = record[given[0]]
    if given == ["image"]:
        images = [images]
    elif not isinstance(images, (list, tuple)):
        raise ChatFormatError(
            f"column 'images' must be a list, got {type(images).__name__}; name a column of one "
            "image 'image'"
        )
    sources = []
    for number, image in enumerate(images):
        try:
            sources.append(image_source(image))
        except ChatFormatError as error:
            raise ChatFormatError(f"image {number} of column {given[0]!r}: {error}") from error
    return sources


def with_images(
    messages: Sequence[Mapping[str, Any]], images: Sequence[ImageSource]
) -> list[dict[str, Any]]:
    """Return the messages with a record's images in their places.

    An image belongs to each content part ``{"type": "image"}`` that doesn't say which image it is,
    in order. Without such parts all come before the text of the first user message, as TRL does it.

    Raises:
        ChatFormatError: if there are more places than images, or fewer.

    >>> with_images([{"role": "user", "content": "Hi"}], [ImageSource("a.png")])[0]["content"][1]
    {'type': 'text', 'text': 'Hi'}
    """
    out = [dict(message) for message in messages]
    if not images:
        return out
    left = list(images)
    num_places = 0
    for message in out:
        if not isinstance(message.get("content"), (list, tuple)):
            continue
        parts = []
        for part in message["content"]:
            if is_image_part(part) and source_of(part) is None:
                num_places += 1
                part = {"type": "image", "image": left.pop(0)} if left else part
            parts.append(part)
        message["content"] = parts
    first = next((message for message in out if message.get("role") == "user"), None)
    if num_places == 0 and first is not None and isinstance(first.get("content"), str):
        places = [{"type": "image", "image": image} for image in images]
        first["content"] = [*places, {"type": "text", "text": first["content"]}]
    elif num_places != len(images):
        raise ChatFormatError(
            f"the row has {counted(len(images), 'image')} and its messages have "
            f"{counted(num_places, 'part')} of type 'image' without one of their own: give as many "
            "of both"
        )
    return out


def put_images(
    token_ids: NDArray[np.int32],
    placeholder_id: int,
    images: Sequence[tuple[ImageSource, NDArray[np.int32]]],
) -> tuple[NDArray[np.int32], list[ImageSpan]]:
    """Return a context with the tokens of images in the places of their placeholders, and where.

    Args:
        token_ids: ``(num_tokens,)``, with one placeholder for each image.
        placeholder_id: its id.
        images: each with its tokens, in order.

    >>> put_images(np.array([1, 9, 2]), 9, [(ImageSource("a"), np.array([9, 9, 9]))])[0]
    array([1, 9, 9, 9, 2])
    """
    places = np.flatnonzero(token_ids == placeholder_id)
    assert len(places) == len(images), (len(places), len(images))
    pieces, spans = [], []
    begin = length = 0
    for place, (source, tokens) in zip(places.tolist(), images, strict=True):
        pieces += [token_ids[begin:place], tokens]
        length += place - begin
        spans.append(ImageSpan(length, length + tokens.size, source))
        length += tokens.size
        begin = place + 1
    return np.concatenate([*pieces, token_ids[begin:]]), spans
