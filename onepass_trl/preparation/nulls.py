"""Which nulls of a dataset are real, and which fill up the rows of a struct column."""

from __future__ import annotations

import json
from typing import Any, cast

from datasets import Dataset, Features, IterableDataset, LargeList, List

from onepass_trl.chat.rows import NullArguments

_LISTS = (List, LargeList)
_MESSAGE_COLUMNS = ("messages", "prompt", "completion", "completions", "conversations")


def settle_null_arguments(dataset: Dataset | IterableDataset, choice: str) -> NullArguments:
    """Return what `choice` means for this dataset: nulls in a JSON column are real."""
    if choice != "auto":
        return cast(NullArguments, choice)
    columns = [
        feature for name, feature in (dataset.features or {}).items() if name in _MESSAGE_COLUMNS
    ]
    return "keep" if columns and all(map(_has_exact_arguments, columns)) else "error"


def with_exact_nulls(row: dict[str, Any], features: Features | None) -> dict[str, Any]:
    """Return the row with tools and template arguments as JSON text, less a struct's fillers.

    A struct column gives every row the keys of all rows, filled with nulls; nulls in `Json` values
    are real. Only the column's type tells them apart, so it is settled here.
    """
    if features is None:
        return row
    columns = [name for name in ("tools", "chat_template_kwargs") if name in features]
    exact = {
        name: json.dumps(_without_fillers(row[name], features[name]))
        for name in columns
        if row[name] is not None and not isinstance(row[name], str)
    }
    return {**row, **exact}


def _without_fillers(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            key: _without_fillers(item, feature[key])
            for key, item in value.items()
            if item is not None
        }
    if isinstance(feature, _LISTS) and isinstance(value, list):
        return [_without_fillers(item, feature.feature) for item in value]
    return value


def _has_exact_arguments(feature: Any) -> bool:
    """Return whether nulls among tool-call arguments in a column of this type can't be fillers."""
    if isinstance(feature, _LISTS):
        return _has_exact_arguments(feature.feature)
    if not isinstance(feature, dict):
        return True  # Json, or text
    if isinstance(feature.get("arguments"), (dict, *_LISTS)):
        return False
    return all(
        _has_exact_arguments(feature[key]) for key in ("tool_calls", "function") if key in feature
    )
