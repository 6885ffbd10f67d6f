"""What the layers of a model must be given: `visible_end`, while the model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_visible_end_required = False


@contextmanager
def visible_end_required() -> Iterator[None]:
    """Make a layer that gets no `visible_end` raise: its model dropped it on the way.

    Such a layer would fall back to plain causal attention over the whole row.
    """
    global _visible_end_required
    before, _visible_end_required = _visible_end_required, True
    try:
        yield
    finally:
        _visible_end_required = before


def layer_name(module: nn.Module) -> str:
    """Return the class and the number of a layer, for messages."""
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"


def check_not_required(module: nn.Module) -> None:
    """Raise ValueError within `visible_end_required`, naming a layer that got none."""
    if _visible_end_required:
        raise ValueError(
            f"{layer_name(module)} got no visible_end: the model doesn't hand what it gets on to "
            "this layer, so it can't be trained in one pass. Use SFTTrainer with one row per turn"
        )
