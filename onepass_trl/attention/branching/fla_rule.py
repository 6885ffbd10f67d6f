"""Gated and Kimi delta rules along the passes of a tree by flash-linear-attention, where it can.

fla takes a whole batch in one call (`fla_backend`). That depends on functions inside it, which may
change with its version. Where it can't be, the reason is said once, and the rule runs along the
tree as any other does.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from onepass_trl.attention.branching.levels import levels_of
from onepass_trl.versions import FLA

logger = logging.getLogger(__name__)

CHUNK_SIZE = 64
"""In tokens: fla's default, which models leave as it is."""


class Fla(NamedTuple):
    """The installed flash-linear-attention."""

    backend: ModuleType | None
    """`fla_backend`, if trees can go through fla."""
    detail: str
    """Its version, or why they can't."""


@functools.cache
def installed_fla() -> Fla:
    """Return what is installed; imports fla."""
    if importlib.util.find_spec("fla") is None:
        return Fla(None, "not installed")
    # Imports of a package whose parts don't fit each other, or the machine, raise any of these.
    try:
        from fla import __version__

        if not FLA.includes(__version__):
            return Fla(None, f"version {__version__}, expected {FLA}")
        from onepass_trl.attention.branching import fla_backend
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return Fla(None, f"it can't be imported: {type(error).__name__}: {error}")
    if (difference := fla_backend.difference()) is not None:
        return Fla(None, f"version {__version__}, whose {difference}")
    return Fla(fla_backend, f"version {__version__}")


@functools.cache
def usable_backend() -> ModuleType | None:
    """Return `fla_backend`, or None; then, if fla is installed, it is logged why it isn't used."""
    fla = installed_fla()
    if fla.backend is None and importlib.util.find_spec("fla") is not None:
        logger.warning(
            "flash-linear-attention is installed, but can't compute a tree in one call (%s), so "
            "layers of linear attention take longer than need be: install %s",
            fla.detail,
            FLA,
        )
    return fla.backend


def along_tree_by_fla(
    backend: ModuleType,
    name: str,
    visible_end: Tensor,
    sequences: Sequence[Tensor],
    **options: Any,
) -> Tensor:
    """Return what a delta rule gives along the passes of a tree, ``(batch, seq, heads, dim)``.

    Args:
        backend: `usable_backend`.
        name: of the rule, as transformers calls it.
        visible_end: ``(batch, seq)``.
        sequences: queries, keys, values, decays and rates, ``(batch, seq, heads, ..)`` each.
        options: what the model gives the rule besides.

    Raises:
        ValueError: fla has no kernel for the size of the keys.
    """
    if (key_dim := sequences[1].shape[-1]) > backend.MAX_KEY_DIM:
        raise ValueError(
            f"{name} got keys of {key_dim} numbers per head, and the kernels of "
            f"flash-linear-attention, which is installed, take at most {backend.MAX_KEY_DIM}: "
            "train where fla is not installed"
        )
    levels = levels_of(visible_end, CHUNK_SIZE)
    ordered = [levels.ordered(x.flatten(0, 1)) for x in sequences]
    out = backend.along_levels(name, levels, ordered, **options)
    return levels.in_rows(out).unflatten(0, visible_end.shape)
