"""Records that hold token ids: passes that are given, not rendered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.turns import TrainOn, chosen_turns
from onepass_trl.passes import IGNORE_INDEX, Pass


def numbered_passes(passes: Any, train_on: TrainOn = "all") -> dict[int, Pass]:
    """Return the passes of a record's ``passes`` that `train_on` chooses and that train something.

    The keys are their numbers in the record.

    Raises:
        ChatFormatError: if a pass can't be read, or none is left.
    """
    if not isinstance(passes, (list, tuple)) or not passes:
        raise ChatFormatError(
            f"'passes' must be a non-empty list of {{'input_ids', 'labels'}}, got "
            f"{str(passes)[:80]!r}"
        )
    given = [_given_pass(pass_, number) for number, pass_ in enumerate(passes)]
    chosen = chosen_turns(train_on, len(given))
    trained = {n: pass_ for n, pass_ in enumerate(given) if n in chosen and pass_.num_trained}
    if not trained:
        raise ChatFormatError(
            f"no label of the passes that train_on={train_on!r} chooses is trained: all are "
            f"{IGNORE_INDEX}; choose others, or remove the row"
        )
    return trained


def _given_pass(given: Any, number: int) -> Pass:
    keys = ("input_ids", "labels")
    if not isinstance(given, Mapping) or any(given.get(key) is None for key in keys):
        raise ChatFormatError(
            f"pass {number} must be a dict with 'input_ids' and 'labels', got {str(given)[:80]}"
        )
    try:
        ids, labels = (np.asarray(given[key]) for key in keys)
    except ValueError as error:  # lists of different lengths
        raise ChatFormatError(f"pass {number} needs lists of whole numbers: {error}") from error
    if (
        ids.ndim != 1
        or ids.shape != labels.shape
        or not all(a.dtype.kind in "iu" for a in (ids, labels))
    ):
        raise ChatFormatError(
            f"pass {number} needs lists of whole numbers of one length, got input_ids {ids.dtype} "
            f"{ids.shape} and labels {labels.dtype} {labels.shape}"
        )
    try:
        return Pass(ids, trained_by_labels(labels, ids))
    except ValueError as error:
        raise ChatFormatError(f"pass {number}: {error}") from error


def trained_by_labels(labels: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which tokens have a label.

    Raises:
        ChatFormatError: if a label is neither `IGNORE_INDEX` nor the id at the same index.
    """
    trained = labels != IGNORE_INDEX
    wrong = np.flatnonzero(trained & (labels != ids))
    if wrong.size:
        at = int(wrong[0])
        raise ChatFormatError(
            f"the label at index {at} is {labels[at]}, expected {IGNORE_INDEX} or the id there, "
            f"{ids[at]}: labels are at the index of their own token, not shifted"
        )
    return trained
