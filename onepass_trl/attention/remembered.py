"""A cache of values computed from tensors, shared by all layers of a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


class _Known(NamedTuple, Generic[Value]):
    made_of: tuple[tuple[int, int, int], ...]
    others: tuple[Tensor, ...]
    """Held, so that no other tensor gets their ids."""
    value: Value


class Remembered(Generic[Value]):
    """Remembers what was made from a tensor for as long as it lives unchanged.

    Invalidated by the tensor's version counter or its address. Writes that bypass both go
    unnoticed: through ``.data``, and by a replayed CUDA graph that writes the tensor itself.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def get(
        self, tensor: Tensor, others: tuple[Tensor, ...], key: Hashable, make: Callable[[], Value]
    ) -> Value:
        """Return `make()`, or what it returned before for these tensors and this key.

        Args:
            tensor: the value is forgotten together with this tensor.
            others: the other tensors that it is made from.
            key: tells values of the same tensors apart.
            make: computes the value, on the current stream.
        """
        tensors = (tensor, *others)
        if _must_be_made(tensors):
            return make()
        known_of_tensor = self._known.setdefault(tensor, {})
        # Another stream would have to wait for the one on which it is made.
        key = (key, torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else key
        made_of = tuple((id(x), x._version, x.data_ptr()) for x in tensors)
        known = known_of_tensor.get(key)
        if known is None or known.made_of != made_of:
            with torch.inference_mode(False):  # training may come to use it too
                known = known_of_tensor[key] = _Known(made_of, others, make())
        return known.value


def once_per_batch(make: Callable[..., Value]) -> Callable[..., Value]:
    """Return `make`, a function of one tensor and a key, with its results remembered for layers."""
    known: Remembered[Value] = Remembered()

    @functools.wraps(make)
    def remembered(tensor: Tensor, *key: Hashable) -> Value:
        return known.get(tensor, (), key, lambda: make(tensor, *key))

    return remembered


def _must_be_made(tensors: tuple[Tensor, ...]) -> bool:
    """A graph replays on other contents of the same tensors; inference tensors count no changes."""
    if torch.compiler.is_compiling() or any(x.is_inference() for x in tensors):
        return True
    return tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
