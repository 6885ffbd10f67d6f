"""Recurrences along the passes of a tree: a call of the model's own function per level and length.

Works with any function that takes the state in which it begins and gives the one in which it ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from onepass_trl.attention.branching.segments import Segments, segments_of
from onepass_trl.attention.remembered import once_per_batch


class Group(NamedTuple):
    """Segments of one level and length: they run as one batch."""

    length: int
    segments: tuple[int, ...]
    parents: tuple[int, ...]
    """The segments before them; none at the first level."""
    has_children: bool


class Groups:
    """The groups of a batch in an order in which parents come first, and its tokens in that order.

    Attributes:
        groups: the groups.
        sizes: how many tokens each group has.
        order: ``(batch * seq,)`` int64, the tokens of the groups one after another.
        place: ``(batch * seq,)`` int64, where each token lies in that order.
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for segment, level in enumerate(segments.levels.tolist()):
            members[level, int(segments.lengths[segment])].append(segment)
        with_children = set(segments.parents.tolist())
        self.groups = [
            Group(
                length=length,
                segments=tuple(chosen),
                parents=tuple(segments.parents[chosen].tolist()) if level > 0 else (),
                has_children=not with_children.isdisjoint(chosen),
            )
            for (level, length), chosen in sorted(members.items())
        ]
        self.sizes = [len(group.segments) * group.length for group in self.groups]
        order = np.concatenate(
            [
                np.add.outer(segments.begins[list(group.segments)], np.arange(group.length)).ravel()
                for group in self.groups
            ]
        )
        self.order = torch.from_numpy(order).to(device)
        self.place = torch.from_numpy(np.argsort(order)).to(device)


@once_per_batch
def _groups_of(visible_end: Tensor) -> Groups:
    return Groups(segments_of(visible_end), visible_end.device)


def along_tree(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    visible_end: Tensor,
    sequences: Sequence[Tensor],
) -> Tensor:
    """Return what a recurrence gives along the passes of a tree, ``(batch, seq, ..)``.

    Args:
        run: called with segments of the sequences, ``(segments, length, ..)`` each, the states in
            which they begin (or None) and whether the states at their end are wanted.
        visible_end: ``(batch, seq)``.
        sequences: ``(batch, seq, heads, ..)`` each.
    """
    batch = _groups_of(visible_end)
    # Ordered and split once: the gradient of a piece taken by itself would be as long as the row.
    ordered = [x.flatten(0, 1).index_select(0, batch.order) for x in sequences]
    by_group = zip(*(x.split(batch.sizes) for x in ordered), strict=True)
    outputs: list[Tensor] = []
    states: dict[int, Tensor] = {}  # in which segments end
    for group, flat in zip(batch.groups, by_group, strict=True):
        pieces = [x.unflatten(0, (-1, group.length)) for x in flat]
        initial = (
            torch.stack([states[parent] for parent in group.parents]) if group.parents else None
        )
        out, final = run(pieces, initial, group.has_children)
        outputs.append(out.flatten(0, 1))
        if group.has_children:
            assert final is not None
            states |= zip(group.segments, final, strict=True)
    return torch.cat(outputs).index_select(0, batch.place).unflatten(0, visible_end.shape)
