"""The implementations of tree attention, and the choice among them."""

from __future__ import annotations

from typing import Literal, get_args

from onepass_trl.attention.implementations.base import Call, Implementation, ImplStatus
from onepass_trl.attention.implementations.cpu import CPU
from onepass_trl.attention.implementations.cuda import CUDA
from onepass_trl.attention.implementations.dense import DENSE
from onepass_trl.attention.implementations.flex import FLEX, FLEX_FLASH
from onepass_trl.attention.implementations.varlen import VARLEN

Impl = Literal["auto", "cuda", "cpu", "varlen", "flex", "flex_flash", "dense"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (CUDA, CPU, VARLEN, FLEX, FLEX_FLASH, DENSE)
"""Best first: "auto" takes the first that suits a call."""


def available_impls() -> list[ImplStatus]:
    """Return the status of every implementation in this process, best first."""
    return [implementation.status() for implementation in IMPLEMENTATIONS]


def choose(impl: Impl, call: Call) -> Implementation:
    """Return the implementation of a name, or for "auto" the first that suits.

    Raises:
        ValueError: the name is unknown, "auto" finds none, or the implementation can't run this.
        ExtensionNotBuiltError: its compiled library is missing.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(get_args(Impl))}")
    for implementation in IMPLEMENTATIONS:
        if implementation.name == impl or (impl == "auto" and implementation.suits(call)):
            implementation.check(call)
            return implementation
    raise ValueError(
        f"q is on {call.q.device}, and no implementation is validated for {call.q.device.type}: "
        "move the tensors to a CPU or CUDA device, or pass impl='flex' or 'dense'"
    )
