"""How many kernels a recurrence along a tree launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def long_chat() -> Tensor:
    """Return `visible_end` of a chat of twenty turns, whose segments have many lengths."""
    lengths = [(5 + turn, 12 + turn % 3) for turn in range(20)]
    seq, ends = sum(map(sum, lengths)), []
    for of_trunk, of_branch in lengths:
        ends += [seq] * of_trunk
        ends += [len(ends) + of_branch] * of_branch
    return torch.tensor([ends], dtype=torch.int32)


class _CountKernels(TorchDispatchMode):
    """Counts operations that compute: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += not (func.is_view or "empty" in func.__name__)
        return func(*args, **kwargs or {})


def kernels(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> int:
    """Return how many a call and its backward launch."""
    with _CountKernels() as counted:
        call(*inputs).sum().backward()
    return counted.number
