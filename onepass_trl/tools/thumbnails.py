"""Images of an inspected row, small enough to be shown with it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from onepass_trl.passes import ImageSource
from onepass_trl.vision import load

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 160  # pixels of a thumbnail, at most


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of an image.

    Attributes:
        image: the copy, in RGB.
        width: of the image itself, in pixels.
        height: the same.
    """

    image: Image
    width: int
    height: int

    def as_uri(self) -> str:
        """Return a ``data:`` URI with the copy, and nothing else of the image's file."""
        buffer = BytesIO()
        self.image.save(buffer, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail_of(source: ImageSource) -> Thumbnail:
    """Return a small copy of an image, at most `SIDE` pixels wide and high.

    Raises:
        ImageError: if it can't be read.
    """
    image = load(source)
    width, height = image.size
    image.thumbnail((SIDE, SIDE))
    image.info = {}  # comments, which a JPEG would keep
    return Thumbnail(image, width, height)
