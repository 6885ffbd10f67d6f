"""The attention mask of "onepass", which is not built unless a layer asks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import sdpa_mask


class DeferredMask:
    """The arguments of `sdpa_mask`, and the mask once a layer without `visible_end` needs it.

    Models build their masks before the first layer, where `visible_end` is not known. Deferring
    them keeps training free of ``(seq, seq)`` tensors.
    """

    # `generate` hands the masks that it prepares for a static cache to the model. By the number of
    # axes transformers tells them from masks of padding, which have two.
    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.window: int | None = arguments.get("local_size")
        self.is_custom: bool = arguments.get("use_vmap", False)
        self._mask: Tensor | None = None
        self._is_built = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_reads_its_mask(name))

    def __getitem__(self, index: Any) -> DeferredMask | Tensor | None:
        """Slice the mask to some queries, as layers that reuse keys do (Gemma 4).

        Such layers need to compute only the last tokens, whose logits are asked for. In training
        these are all, and the mask remains deferred.
        """
        of_queries = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        everything = slice(None)
        if not isinstance(of_queries, slice) or (
            index != (everything, everything, of_queries, everything)
        ):
            raise TypeError(_reads_its_mask(index))
        num_queries = self.arguments["q_length"]
        queries = range(num_queries)[of_queries]
        if len(queries) == num_queries:
            return self
        mask = self.materialize()
        if mask is None and queries == range(num_queries - 1, num_queries):
            return None  # the last token sees all keys
        if mask is None:
            # None would be read as the causal mask of the first queries.
            mask = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        return mask[index]

    def materialize(self) -> Tensor | None:
        """Return the ``(batch, 1, seq, seq)`` bool mask, or None for plain causal attention."""
        if not self._is_built:
            self._mask, self._is_built = sdpa_mask(**self.arguments), True
        return self._mask

    def contiguous(self) -> Tensor | None:
        """Return the mask: before transformers 5.24, `generate` calls this for a static cache."""
        mask = self.materialize()
        return None if mask is None else mask.contiguous()


def _reads_its_mask(what: object) -> str:
    return (
        f"the model reads {what!r} of its attention mask, which one-pass attention replaces by "
        "visible_end: models that compute with the mask themselves can't be trained in one pass"
    )


def onepass_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **kwargs: Any,
) -> DeferredMask | Tensor | None:
    """Return a `DeferredMask`, or with cached keys (so without a tree) the mask of "sdpa"."""
    prepared = kwargs.get("attention_mask")
    if isinstance(prepared, DeferredMask):
        return prepared
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        **kwargs,
    }
    # A static cache counts with tensors: their values may not be read while compiling.
    is_static = isinstance(q_offset, Tensor)
    if is_static or q_length != kv_length or q_offset != 0 or kv_offset != 0:
        num_sharing: int = getattr(kwargs.get("config"), "num_kv_shared_layers", 0)
        if q_length > 1 and num_sharing > 0:
            # None can't be sliced, see `DeferredMask.__getitem__`; a static cache has unused keys.
            arguments["allow_is_causal_skip"] = False
        return sdpa_mask(**arguments)
    return DeferredMask(arguments)
