"""Where conversations come from: a dataset of the Hub, or local .jsonl, .json or .parquet files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".json", ".parquet")


def load_conversations(
    name: str, split: str, *, config: str | None = None, streaming: bool = False
) -> Any:
    """Return the split as a `datasets.Dataset` (or `IterableDataset` where `streaming`).

    Args:
        name: a dataset of the Hub or a local folder, as for `datasets.load_dataset`; or the path of
            a .jsonl, .json or .parquet file, or a pattern such as ``data/*.jsonl`` for several.
        split: a split, or a slice of one: ``train``, ``train[:90%]``, ``train[-100:]``. Local files
            have one split, ``train``.
        config: the dataset's configuration, where it has several.
        streaming: read rows as they are needed; slices are then not possible.

    Raises:
        FileNotFoundError: if `name` ends like a file and there is none.
        ValueError: if there is no such split, or a line of a file is not a JSON object.
    """
    suffix = Path(name).suffix
    if suffix not in _SUFFIXES:
        return _load_split(name, split, {"path": name, "name": config}, streaming)
    files = sorted(glob.glob(name, recursive=True)) or [name]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"dataset {name!r} ends like a {suffix} file, but there is no such file in "
                f"{Path(name).parent.resolve()}"
            )
    if config is not None:
        raise ValueError(
            f"a local file has no configurations, got {config!r} for {name!r}: drop "
            "--dataset_config"
        )
    if suffix == ".parquet":
        source = {"path": "parquet", "data_files": {"train": files}}
        return _load_split(name, split, source, streaming)
    return _load_json(name, files, split, streaming)


def read_row(dataset: Any, index: int) -> dict[str, Any]:
    """Return a row as training reads it: without what a struct column fills up with nulls."""
    from onepass_trl.training.nulls import with_exact_nulls

    return with_exact_nulls(dataset[index], dataset.features)


def _load_split(name: str, split: str, source: dict[str, Any], streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(**source, split=split, streaming=streaming)
    except ValueError as error:
        if "nknown split" not in str(error) and "Bad split" not in str(error):
            raise
        raise _no_split(name, split, error) from None


def _no_split(name: str, split: str, error: Exception) -> ValueError:
    return ValueError(
        f"dataset {name!r} has no split {split!r}: {error} Name an existing split with "
        "--dataset_train_split, --dataset_test_split or --dataset_split, or a slice of one: "
        "'train[:90%]' to train on and 'train[90%:]' to evaluate on"
    )


def _load_json(name: str, files: list[str], split: str, streaming: bool) -> Any:
    """Return the rows of JSON files, what is nested in them as JSON text.

    The reader of `datasets` gives nested values one type for all rows, which fails on (or fills up)
    tool calls with different arguments, and it rounds numbers to ten digits.
    """
    from datasets import Dataset, Features, IterableDataset, ReadInstruction, Value
    from datasets.exceptions import DatasetGenerationError

    columns = list(dict.fromkeys(key for file in files for row in _read_json(file) for key in row))
    if not columns:
        raise ValueError(f"{name!r} holds no rows: it needs one JSON object a line")
    features = Features({column: Value("string") for column in columns})
    # Size and time of the files are there for the cache: it must not outlive their content.
    stamps = tuple((Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files)
    arguments: dict[str, Any] = {"files": tuple(files), "columns": tuple(columns)}
    if streaming:
        if split != "train":
            raise _no_split(name, split, ValueError("a stream of local files has only 'train'."))
        return IterableDataset.from_generator(_text_rows, features=features, gen_kwargs=arguments)
    try:
        dataset = Dataset.from_generator(
            _text_rows, features=features, gen_kwargs={**arguments, "stamps": stamps}
        )
        (part,) = ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    except (ValueError, AssertionError) as error:
        raise _no_split(name, split, error) from None
    end = len(dataset) if part.to is None else min(part.to, len(dataset))
    rows = range(part.from_ or 0, end)
    if not rows:
        raise ValueError(f"{split!r} of {name!r} holds none of its {len(dataset)} rows")
    return dataset.select(rows)


def _read_json(file: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file: one a line, or those of a JSON list."""
    if file.endswith(".json"):
        text = Path(file).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            try:
                elements = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not JSON: {error}") from None
            for number, element in enumerate(elements):
                yield _as_row(element, f"{file}, element {number}")
            return
    with open(file, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
            yield _as_row(value, f"{file}, line {number}")


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(
        f"{where} must be a JSON object with the columns of a row, got {type(value).__name__}"
    )


def _text_rows(
    files: tuple[str, ...], columns: tuple[str, ...], stamps: Any = None
) -> Iterator[dict[str, Any]]:
    for file in files:
        for row in _read_json(file):
            yield {column: _as_text(row.get(column)) for column in columns}


def _as_text(value: Any) -> str | None:
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
