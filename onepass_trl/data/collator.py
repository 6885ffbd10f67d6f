"""Rows to batch tensors. The only data stage that knows torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onepass_trl.data.layout import TOKEN_COLUMNS, Layout, concatenate
from onepass_trl.data.row_check import check_rows
from onepass_trl.passes import IGNORE_INDEX

MODEL_INPUTS = ("input_ids", "position_ids", "shift_labels", "visible_end")
"""What a model gets from a batch to compute the log-probabilities of its targets."""

_PADDING_RUN = 64  # tokens
_DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "shift_labels": torch.int64,
    "weights": torch.float32,
    "visible_end": torch.int32,
    "multiplicity": torch.int64,
}


@dataclass
class OnePassCollator:
    """Collates rows into one batch, padded on the right to its longest row.

    Padding sees nothing but padding, is seen by nothing else and has no target, so no attention
    mask is needed. It is divided into runs of 64 tokens, at which layers that carry state restart.

    Returns a dict of tensors, all ``(batch, seq)`` but the last two:

    - ``input_ids``, ``position_ids``, ``shift_labels``: int64
    - ``weights``: float32
    - ``visible_end``: int32
    - ``multiplicity``: int64; 0 on padding and fork copies
    - ``attention_mask``: int64; 0 on padding, for code that counts tokens
    - ``num_turns``, ``row_lengths`` (in tokens): int64, ``(batch, 1)``, or ``(1, num_rows)`` if
      padding-free

    Args:
        pad_token_id: id of the padding tokens; any id of the vocabulary does.
        padding_free: put all rows one after another into a single row instead of padding them to
            the same length.
        pad_to_multiple_of: pad the sequence to a multiple of this.
        vocab_size: refuse token ids and targets that aren't less; None takes any.

    >>> from onepass_trl import Pass, build_tree, linearize
    >>> long = linearize(build_tree([Pass([1, 2, 3], [0, 1, 1])]))
    >>> short = linearize(build_tree([Pass([4, 5], [0, 1])]))
    >>> batch = OnePassCollator()([long, short])
    >>> batch["input_ids"]
    tensor([[1, 2, 3],
            [4, 5, 0]])
    >>> batch["shift_labels"]
    tensor([[   2,    3, -100],
            [   5, -100, -100]])
    >>> batch["visible_end"]
    tensor([[3, 3, 3],
            [2, 2, 3]], dtype=torch.int32)
    >>> OnePassCollator(padding_free=True)([long, short])["visible_end"]
    tensor([[3, 3, 3, 5, 5]], dtype=torch.int32)
    """

    pad_token_id: int = 0
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of must be at least 1, or None, got {self.pad_to_multiple_of}"
            )

    def __call__(self, rows: Sequence[Layout | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of `rows`: layouts, or rows of a dataset with the same columns.

        Raises:
            ValueError: for a row that no tree of passes has, or of another vocabulary.
        """
        layouts = [
            row if isinstance(row, Layout) else as_layout(row, f"row {number} of the batch")
            for number, row in enumerate(rows)
        ]
        self._check_vocabulary(layouts)
        shape = (1, -1) if self.padding_free else (-1, 1)
        num_turns = torch.tensor([layout.num_turns for layout in layouts]).view(shape)
        row_lengths = torch.tensor([len(layout) for layout in layouts]).view(shape)
        if self.padding_free:
            layouts = [concatenate(layouts)]
        length = max(len(layout) for layout in layouts)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        fill: dict[str, int] = {"input_ids": self.pad_token_id, "shift_labels": IGNORE_INDEX}
        batch = {
            name: torch.full((len(layouts), length), fill.get(name, 0), dtype=dtype)
            for name, dtype in _DTYPES.items()
        }
        for index, layout in enumerate(layouts):
            padding = np.arange(length - len(layout)) // _PADDING_RUN + 1
            ends = np.minimum(len(layout) + padding * _PADDING_RUN, length)
            batch["visible_end"].numpy()[index, len(layout) :] = ends
            batch["position_ids"].numpy()[index, len(layout) :] = (
                np.arange(length - len(layout)) % _PADDING_RUN
            )
            for name in TOKEN_COLUMNS:
                batch[name].numpy()[index, : len(layout)] = getattr(layout, name)
        lengths = row_lengths.sum(dim=1, keepdim=True)
        batch["attention_mask"] = (torch.arange(length) < lengths).long()
        return {**batch, "num_turns": num_turns, "row_lengths": row_lengths}

    def _check_vocabulary(self, layouts: Sequence[Layout]) -> None:
        for number, layout in enumerate(layouts if self.vocab_size is not None else ()):
            for name in ("input_ids", "shift_labels"):
                if (largest := getattr(layout, name).max()) >= self.vocab_size:
                    raise ValueError(
                        f"row {number} of the batch has {largest} among its {name}, but the "
                        f"vocabulary has {self.vocab_size} tokens: prepare the dataset with the "
                        "model's own tokenizer"
                    )


def as_layout(row: Mapping[str, Any], name: str = "the row") -> Layout:
    """Return the layout of a prepared row, given its columns.

    Raises:
        ValueError: if a column is missing, or no tree of passes has such a row; the message calls
            it `name`.
    """
    missing = [name for name in (*TOKEN_COLUMNS, "num_turns") if name not in row]
    if missing:
        raise ValueError(
            "a row for OnePassCollator needs the columns of a Layout, missing: "
            f"{', '.join(missing)}; got: {', '.join(row)}. Let OnePassSFTTrainer prepare the "
            "dataset, or make rows with onepass_trl.linearize"
        )
    given = {column: np.asarray(row[column]) for column in TOKEN_COLUMNS}
    for column, values in given.items():
        if values.ndim != 1:
            raise ValueError(
                f"{name} has {column} of shape {values.shape}, expected one value for each token"
            )
    lengths = {column: np.array([values.size]) for column, values in given.items()}
    check_rows(given, lengths, lambda _: name)
    arrays: dict[str, Any] = {
        column: values.astype(np.float32 if column == "weights" else np.int32, copy=False)
        for column, values in given.items()
    }
    return Layout(**arrays, num_turns=int(row["num_turns"]))
