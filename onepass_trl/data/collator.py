"""Rows to batch tensors. The only data stage that knows torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onepass_trl.data.image_positions import image_blocks, position_planes
from onepass_trl.data.layout import TOKEN_COLUMNS, Layout, concatenate
from onepass_trl.data.row_check import check_rows
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.vision import Vision
from onepass_trl.wording import counted

ABOUT_ROWS = ("weights", "multiplicity", "attention_mask", "num_turns", "row_lengths")
"""What a batch has for the loss and the metrics. The model gets all else."""

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

    and, if rows have images, what the model gets of these, in the order of their tokens:
    ``pixel_values`` and whatever else the processor returns. Images are read and processed here,
    each once for every place that it has in a row.

    Args:
        pad_token_id: id of the padding tokens; any id of the vocabulary does.
        padding_free: put all rows one after another into a single row instead of padding them to
            the same length.
        pad_to_multiple_of: pad the sequence to a multiple of this.
        vocab_size: refuse token ids and targets that aren't less; None takes any.
        vision: processes the images of rows; None refuses rows with images.
        planes: whether the model's rotary embeddings have a plane for each axis of an
            image. Then ``position_ids`` are ``(4, batch, seq)`` if there are images: of the text,
            time, height and width.
        blocks: whether the model sees the tokens of an image in both directions. Then
            ``visible_begin``, ``(batch, seq)`` int32, comes with images.

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
    vision: Vision | None = None
    planes: bool = False
    blocks: bool = False

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
        batch |= self._of_images(layouts, batch["position_ids"])
        return {**batch, "num_turns": num_turns, "row_lengths": row_lengths}

    def _of_images(
        self, layouts: Sequence[Layout], position_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return what the model gets of the images, and the positions that follow from them."""
        sources = [span.source for layout in layouts for span in layout.images]
        if not sources:
            return {}
        if self.vision is None:
            raise ValueError(
                "a row of the batch has images, which need the model's processor: give it to the "
                "trainer as processing_class, or OnePassCollator "
                "vision=onepass_trl.vision.vision_of(processor)"
            )
        inputs = self.vision.inputs(sources)
        if self.planes:
            grids = iter(inputs["image_grid_thw"].tolist())
            position_ids = position_ids.repeat(4, 1, 1)
            for index, layout in enumerate(layouts):
                of_row = list(itertools.islice(grids, len(layout.images)))
                position_ids.numpy()[:, index, : len(layout)] = position_planes(
                    layout, of_row, self.vision.merge_size
                )
            inputs["position_ids"] = position_ids
        if self.blocks:
            shape = position_ids.shape[-2:]
            begins = torch.arange(shape[1], dtype=torch.int32).repeat(shape[0], 1)
            for index, layout in enumerate(layouts):
                is_image = self.vision.is_image(layout.input_ids)
                begins.numpy()[index, : len(layout)] = image_blocks(layout, is_image)
            inputs["visible_begin"] = begins
        return inputs

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
    layout = Layout.from_columns({**row, **arrays, "num_turns": int(row["num_turns"])})
    end = 0
    for span in layout.images:
        if not end <= span.begin < span.end <= len(layout):
            raise ValueError(
                f"{name} has an image in tokens {span.begin} to {span.end}, expected images in "
                f"order within the row of {counted(len(layout), 'token')}"
            )
        end = span.end
    return layout


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a model gets from a batch to compute the log-probabilities of its targets."""
    return {name: values for name, values in batch.items() if name not in ABOUT_ROWS}
