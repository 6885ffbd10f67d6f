"""Rows that stand in pieces on several processes: context parallelism by heads.

Outside attention a process computes its piece of each row. In attention it has whole rows and its
share of the heads, by an exchange before and one after it (DeepSpeed-Ulysses, arXiv 2309.14509).
So the one rule and its kernels stay as they are, and every process has the same work, however
unequal the pieces of a tree are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The processes that share a batch, and what their attention needs of its whole rows.

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

    def own_heads(self, tensor: Tensor) -> Tensor:
        """Return this process's share of what has one entry per query head, ``(heads,)``."""
        return tensor.chunk(self.size)[self.rank]

    def to_whole_rows(self, layer: str, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return query, key and value of whole rows, for this process's share of the heads.

        Args:
            layer: name of the layer, for errors.
            query: ``(batch, heads, seq / size, head_dim)``.
            key: likewise; it may have fewer heads than there are processes, which then share them.
            value: likewise.

        Returns:
            ``(batch, max(heads / size, 1), seq, head_dim)`` each.

        Raises:
            ValueError: the heads can't be shared out.
        """
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % self.size or (kv_heads % self.size and self.size % kv_heads):
            raise ValueError(
                f"{layer} has {heads} query and {kv_heads} key heads, which {self.size} processes "
                "can't share (cp_size): cp_size must divide the number of query heads, and divide "
                "the number of key heads or be a multiple of it. Choose another cp_size"
            )
        pieces = [self._by_process(tensor) for tensor in (query, key, value)]
        widths = [piece.shape[-2] * piece.shape[-1] for piece in pieces]
        # One exchange for all three: (size, batch, seq / size, features of all heads).
        exchanged = _exchange(torch.cat([piece.flatten(-2) for piece in pieces], -1), self.group)
        whole = exchanged.transpose(0, 1).flatten(1, 2)
        return [
            part.unflatten(-1, piece.shape[-2:]).transpose(1, 2)
            for part, piece in zip(whole.split(widths, dim=-1), pieces, strict=True)
        ]

    def to_own_piece(self, out: Tensor) -> Tensor:
        """Return all heads of this process's piece, as attention functions return them.

        Args:
            out: ``(batch, heads / size, seq, head_dim)``.

        Returns:
            ``(batch, seq / size, heads, head_dim)``.
        """
        by_process = out.unflatten(2, (self.size, -1)).permute(2, 0, 3, 1, 4)
        return _exchange(by_process, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _by_process(self, tensor: Tensor) -> Tensor:
        """Return ``(size, batch, seq / size, heads of that process, head_dim)``."""
        if (heads := tensor.shape[1]) < self.size:
            tensor = tensor.repeat_interleave(self.size // heads, dim=1)
        return tensor.unflatten(1, (self.size, -1)).permute(1, 0, 3, 2, 4)


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
