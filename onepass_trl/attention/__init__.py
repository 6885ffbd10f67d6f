"""Tree attention: the op, its implementations, and the backend for transformers."""

from onepass_trl.attention.api import (
    ExtensionNotBuiltError,
    ImplStatus,
    available_impls,
    tree_attention,
)

__all__ = ["ExtensionNotBuiltError", "ImplStatus", "available_impls", "tree_attention"]
