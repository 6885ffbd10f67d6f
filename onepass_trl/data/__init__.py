"""From passes to rows: the prefix tree, its layout as one flat sequence, packing."""

from onepass_trl.data.layout import Layout, concatenate, linearize, linearize_with_targets
from onepass_trl.data.packing import Overflow, limit_passes, pack, split_passes
from onepass_trl.data.tree import TokenTree, build_tree

__all__ = [
    "Layout",
    "Overflow",
    "TokenTree",
    "build_tree",
    "concatenate",
    "limit_passes",
    "linearize",
    "linearize_with_targets",
    "pack",
    "split_passes",
]
