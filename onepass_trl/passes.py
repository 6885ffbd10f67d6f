"""A pass: what inference sees and must generate in one turn, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onepass_trl.wording import counted

IGNORE_INDEX = -100
"""The label of a token that isn't trained."""


def is_address(path: str) -> bool:
    """Return whether an image is at a URL or in a ``data:`` URI, not in a file."""
    return path.startswith(("http://", "https://", "data:image/"))


@dataclass(frozen=True)
class ImageSource:
    """Where an image is: in a file, at an address, or in memory. Equal sources are one image.

    Attributes:
        path: A path, a URL or a ``data:`` URI; None if `content` is given.
        content: The bytes of an image file; None if `path` is given.
    """

    path: str | None = None
    content: bytes | None = field(default=None, repr=False)

    @property
    def is_remote(self) -> bool:
        """Whether it is at an address, or in one."""
        return is_address(self.path or "")

    def __str__(self) -> str:
        if self.content is not None:
            return f"{len(self.content)} bytes"
        path = str(self.path)
        return f"{path[:60]!r}.." if path.startswith("data:") else repr(path)


@dataclass(frozen=True)
class ImageSpan:
    """The tokens that an image is for a model: all that the processor puts in its place.

    Attributes:
        begin: Index of the first of them.
        end: Index after the last.
        source: The image.
    """

    begin: int
    end: int
    source: ImageSource

    def shifted(self, by: int) -> ImageSpan:
        """Return the span with `by` added to its begin and end."""
        return replace(self, begin=self.begin + by, end=self.end + by)


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass of ordinary (N-pass) training: a context and its completion.

    Attributes:
        token_ids: ``(num_tokens,)`` int32. Context and completion, in order.
        trained: ``(num_tokens,)`` bool. True where the token is a target of the loss in this pass.
            A target is predicted from the token before it, so the first token can't be one.
        images: The spans of its images, in order.

    Raises:
        ValueError: if the shapes differ, the pass is empty, an id is negative, the first token is
            trained, a token of an image or right after one is, or the spans aren't in order.

    >>> Pass([5, 6, 7], [False, False, True]).num_trained
    1
    """

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    images: tuple[ImageSpan, ...]

    def __init__(
        self, token_ids: ArrayLike, trained: ArrayLike, images: Sequence[ImageSpan] = ()
    ) -> None:
        given = np.asarray(token_ids)
        if given.size and given.dtype.kind in "iu" and given.max() > np.iinfo(np.int32).max:
            raise ValueError(f"token ids must be less than 2^31, got {given.max()}")
        ids = np.ascontiguousarray(given, dtype=np.int32)
        mask = np.ascontiguousarray(trained, dtype=np.bool_)
        if ids.ndim != 1 or ids.shape != mask.shape:
            raise ValueError(
                f"a pass needs one `trained` flag for each token, got token_ids {ids.shape} and "
                f"trained {mask.shape}"
            )
        if ids.size == 0:
            raise ValueError("a pass needs at least one token, got none")
        if ids.min() < 0:
            raise ValueError(
                f"token ids must not be negative, got {ids.min()} at index {ids.argmin()}"
            )
        if mask[0]:
            raise ValueError(
                "the first token of a pass is marked as trained, but nothing precedes it to "
                "predict it from; mark it as context (label -100) or put a beginning-of-sequence "
                "token before it"
            )
        end = 0
        for span in images:
            if not end <= span.begin < span.end <= ids.size:
                raise ValueError(
                    f"the images of a pass of {counted(ids.size, 'token')} must be in order, each "
                    "within it and after the one before it, got tokens "
                    f"{span.begin} to {span.end} after {end}"
                )
            end = span.end
            if mask[span.begin : end + 1].any():
                raise ValueError(
                    f"the image in tokens {span.begin} to {end} of a pass is trained, or the token "
                    "after it is: only text can be, and only after text"
                )
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "trained", mask)
        object.__setattr__(self, "images", tuple(images))

    def __len__(self) -> int:
        return self.token_ids.size

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return int(self.trained.sum())

    def first(self, num_tokens: int) -> Pass | None:
        """Return the first tokens of the pass, or None if none of them is trained.

        They are fewer where an image would be cut.

        >>> Pass([1, 7, 7, 2, 3], [0, 0, 0, 0, 1], [ImageSpan(1, 3, ImageSource("a"))]).first(4)
        >>> Pass([1, 2, 3], [0, 1, 1]).first(2).token_ids
        array([1, 2], dtype=int32)
        """
        for span in self.images:
            if span.begin < num_tokens < span.end:
                num_tokens = span.begin
        if not self.trained[:num_tokens].any():
            return None
        images = [span for span in self.images if span.end <= num_tokens]
        return Pass(self.token_ids[:num_tokens], self.trained[:num_tokens], images)
