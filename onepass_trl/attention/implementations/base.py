"""What an implementation of tree attention is given and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from onepass_trl.attention import ops  # noqa: F401 (defines the op)


class ExtensionNotBuiltError(RuntimeError):
    """A compiled library, `_cpu.so` or `_cuda.so`, is missing or cannot be loaded."""


class ImplStatus(NamedTuple):
    """Whether one implementation can be used here."""

    name: str
    built: bool
    devices: tuple[str, ...]
    """Device types it runs on in this process."""
    detail: str
    """What it is, or why it cannot run and what to do."""


class Call(NamedTuple):
    """Arguments of `tree_attention`, checked against each other."""

    q: Tensor
    """``(batch, heads, seq, d_qk)``."""
    k: Tensor
    """``(batch, kv_heads, seq, d_qk)``."""
    v: Tensor
    """``(batch, kv_heads, seq, d_v)``."""
    visible_end: Tensor
    """``(batch, seq)`` int32."""
    scale: float
    positions: Tensor | None
    """``(batch, seq)`` int32; None without a window."""
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """``(heads,)`` in the dtype of lse."""
    visible_begin: Tensor | None = None
    """``(batch, seq)`` int32; None if each token's is its own index."""


def _never(_: Call) -> bool:
    return False


class Implementation(NamedTuple):
    """One way to compute tree attention."""

    name: str
    status: Callable[[], ImplStatus]
    """Returns whether it can be used in this process."""
    check: Callable[[Call], None]
    """Raises ValueError or ExtensionNotBuiltError, with what to do, if it can't run a call."""
    run: Callable[[Call], tuple[Tensor, Tensor]]
    """Returns `(out, lse)` as `dense_tree_attention` does; differentiable."""
    suits: Callable[[Call], bool] = _never
    """Whether "auto" takes it for a call, unless one before it in the list suits."""


def check_dtype(impl: str, call: Call, supported: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless an implementation supports the dtype of a call."""
    if call.q.dtype not in supported:
        names = ", ".join(map(str, supported))
        raise ValueError(f"impl={impl!r}: q is {call.q.dtype}, expected one of {names}")


WITHOUT_BLOCKS = ("cuda", "varlen", "flex_flash")
"""The implementations that take no `visible_begin`."""


def refuse_blocks(impl: str, call: Call) -> None:
    """Raise ValueError for an implementation that can't run a call with `visible_begin`."""
    assert impl in WITHOUT_BLOCKS
    if call.visible_begin is not None:
        raise ValueError(
            f"impl={impl!r} takes no visible_begin, with which a block, as of an image's tokens, "
            "is seen in both directions: use impl='auto', or 'flex' on a CUDA device"
        )


def run_op(call: Call, plan: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what the op computes, on the device of the call's tensors."""
    given = call._asdict() | {"window": call.window or 0, "softcap": call.softcap or 0.0}
    return torch.ops.onepass.tree_attention(**given, plan=plan)
