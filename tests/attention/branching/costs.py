"""What a recurrence along a tree launches, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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


def bytes_of_states(call: Callable[..., Tensor], inputs: Sequence[Tensor], *state: int) -> int:
    """Return how much of what a call keeps for its backward are states, which end in this shape."""
    sizes: dict[int, int] = {}
    kept = []  # so that no other tensor gets the address of one of these

    def keep(x: Tensor) -> Tensor:
        if x.shape[-len(state) :] == state:
            kept.append(x)
            sizes[x.data_ptr()] = x.nbytes
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        call(*inputs)
    return sum(sizes.values())
