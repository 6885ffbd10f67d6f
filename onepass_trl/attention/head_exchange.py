"""Rows that are divided among several processes: context parallelism by heads.

Where tokens don't mix, a process computes its piece of each row. Where they do, it has whole rows
and its share of the heads, by an exchange before and one after it (DeepSpeed-Ulysses, arXiv
2309.14509). So the one rule and its kernels stay as they are, as do recurrences and convolutions,
and every process has the same work, however unequal the pieces of a tree are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The processes that share a batch, and what their layers need of its whole rows.

    Process r of `group` holds tokens ``[r * seq / size, (r + 1) * seq / size)`` of every row, and
    the `visible_end` of all of it.

    Args:
        group: the processes.
        position_ids: ``(batch, seq)``, of whole rows.
    """

    group: dist.ProcessGroup
    position_ids: Tensor

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.group.size()

    def own_piece(self, tensor: Tensor) -> Tensor:
        """Return this process's piece of ``(batch, seq)``: ``(batch, seq / size)``."""
        return tensor.chunk(self.size, dim=1)[self.rank]

    def own_share(self, tensor: Tensor) -> Tensor:
        """Return this process's share of what has one entry per head, ``(heads, ..)``."""
        return tensor.chunk(self.size)[self.rank]

    def to_whole_rows(self, layer: str, *tensors: Tensor) -> list[Tensor]:
        """Return whole rows of tensors such as queries, for this process's share of the heads.

        Args:
            layer: its name, for errors.
            *tensors: ``(batch, seq / size, heads, ..)`` each; if one has fewer heads than there are
                processes, as keys may, several processes get the same head.

        Returns:
            ``(batch, seq, max(heads / size, 1), ..)`` each.

        Raises:
            ValueError: the heads can't be shared out.
        """
        heads = [tensor.shape[2] for tensor in tensors]
        most = max(heads)
        if most % self.size or any(few % self.size and self.size % few for few in heads):
            raise ValueError(
                f"{layer} has {', '.join(map(str, heads))} heads, which {self.size} processes "
                "can't share (cp_size): the most must be a multiple of cp_size, others a multiple "
                "or a divisor. Choose another cp_size"
            )
        pieces = [self._by_process(tensor) for tensor in tensors]
        whole: dict[int, Tensor] = {}
        # One exchange for all of a dtype: (size, batch, seq / size, all features). In the same
        # order in all processes, which a set has not.
        for dtype in dict.fromkeys(piece.dtype for piece in pieces):
            chosen = [at for at, piece in enumerate(pieces) if piece.dtype == dtype]
            flat = [pieces[at].flatten(3) for at in chosen]
            exchanged = _exchange(torch.cat(flat, dim=-1), self.group)
            rows = exchanged.transpose(0, 1).flatten(1, 2)
            parts = rows.split([part.shape[-1] for part in flat], dim=-1)
            for at, part in zip(chosen, parts, strict=True):
                whole[at] = part.unflatten(-1, pieces[at].shape[3:])
        return [whole[at] for at in range(len(pieces))]

    def to_own_piece(self, out: Tensor) -> Tensor:
        """Return all heads of this process's piece, from whole rows of its share of the heads.

        Args:
            out: ``(batch, seq, heads / size, ..)``.

        Returns:
            ``(batch, seq / size, heads, ..)``, contiguous.
        """
        by_process = out.unflatten(1, (self.size, -1)).transpose(0, 1)
        return _exchange(by_process, self.group).movedim(0, 2).flatten(2, 3).contiguous()

    def _by_process(self, tensor: Tensor) -> Tensor:
        """Return ``(size, batch, seq / size, heads of that process, ..)``."""
        if (heads := tensor.shape[2]) < self.size:
            tensor = tensor.repeat_interleave(self.size // heads, dim=2)
        return tensor.unflatten(2, (self.size, -1)).movedim(2, 0)


def _exchange(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return ``(size, ...)`` whose entry r is what process r had for this one."""
    out: Tensor = _Exchange.apply(tensor, group)
    return out


class _Exchange(torch.autograd.Function):
    """All-to-all along the first dimension; its gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        tensor = tensor.contiguous()
        out = torch.empty_like(tensor)
        dist.all_to_all_single(out, tensor, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradients[0], ctx.group), None
