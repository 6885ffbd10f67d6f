"""A pass: what inference sees and must generate in one turn, and which tokens are trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORE_INDEX = -100
"""The label of a token that isn't trained."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass of ordinary (N-pass) training: a context and its completion.

    Attributes:
        token_ids: ``(num_tokens,)`` int32. Context and completion, in order.
        trained: ``(num_tokens,)`` bool. True where the token is a target of the loss in this pass.
            A target is predicted from the token before it, so the first token can't be one.

    Raises:
        ValueError: if the shapes differ, the pass is empty, an id is negative or the first token is
            trained.

    >>> Pass([5, 6, 7], [False, False, True]).num_trained
    1
    """

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]

    def __init__(self, token_ids: ArrayLike, trained: ArrayLike) -> None:
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
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "trained", mask)

    def __len__(self) -> int:
        return self.token_ids.size

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return int(self.trained.sum())
