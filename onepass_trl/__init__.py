"""One-pass supervised fine-tuning of reasoning models, with tree attention.

The names below are loaded on first use, so that ``import onepass_trl`` needs neither the compiled
extension nor TRL.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Pass": "passes",
    "render_passes": "chat",
    "register_family": "chat",
    "TokenTree": "data",
    "build_tree": "data",
    "Layout": "data",
    "linearize": "data",
    "OnePassCollator": "data.collator",
    "tree_attention": "attention",
    "use_onepass_attention": "attention.transformers_backend",
    "load_conversations": "preparation.loading",
    "PreparationOptions": "preparation.options",
    "render_record": "preparation.rows",
    "OnePassSFTConfig": "training",
    "OnePassSFTTrainer": "training",
    "SetSFTConfig": "setsft",
    "SetSFTTrainer": "setsft",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
