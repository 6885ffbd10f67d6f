"""Tree attention: the op, its implementations, and the backend for transformers."""

from onepass_trl.attention.api import tree_attention
from onepass_trl.attention.implementations.base import ExtensionNotBuiltError, ImplStatus
from onepass_trl.attention.implementations.registry import available_impls

__all__ = ["ExtensionNotBuiltError", "ImplStatus", "available_impls", "tree_attention"]
