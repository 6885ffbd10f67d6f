"""Where conversations come from: a dataset of the Hub, or local files of JSON or Parquet."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError

from onepass_trl.preparation.cache import code_digest, files_digest
from onepass_trl.preparation.json_files import JSON_SUFFIXES, NOT_TEXT, not_text, read_json
from onepass_trl.wording import counted

_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_UNREAD = {
    ".txt": 'write it as {"text": ..}, one a line, into a .jsonl file',
    ".zst": "decompress it",
    **dict.fromkeys((".csv", ".tsv", ".arrow", ".zip", ".tar"), "convert it"),
}


def load_conversations(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
) -> Any:
    """Return the split as a `datasets.Dataset` (or `IterableDataset` where `streaming`).

    What is nested in local JSON files comes as JSON text, as `OnePassSFTTrainer` takes it: the
    reader of `datasets` gives nested values one type for all records, which fails on (or fills up)
    tool calls with different arguments, and it rounds numbers to ten digits.

    Args:
        name: a dataset of the Hub or a local folder, as for `datasets.load_dataset`; or the path of
            a .jsonl, .ndjson, .json (each also with .gz, .bz2 or .xz) or .parquet file, or, unless
            there is a file of that very name, a pattern such as ``data/*.jsonl`` for several.
        split: a split, or a slice of one: ``train``, ``train[:90%]``, ``train[-100:]``. Local files
            have one split, ``train``; a folder has those that the names of its files say.
        config: the dataset's configuration, where it has several.
        streaming: read records as they are needed; slices are then not possible.
        text_field: the column of plain text, as ``dataset_text_field``. Where it holds something
            else in a local JSON file, or ``prompt``, ``completion`` or ``system`` does, that is not
            taken for its JSON text: it is an error when the record is prepared.

    Raises:
        FileNotFoundError: if `name` ends like a file and there is none.
        ValueError: if there is no such split, the file is of another kind or damaged, or a line of
            it is not a JSON object. One that can't be stored is an error when it is prepared, or
            left out with ``invalid_turns="drop"``.
    """
    if not name.strip():
        raise ValueError(
            f"the name of the dataset is {name!r}, expected one of the Hub, a folder or a file"
        )
    suffix = _suffix(name)
    if Path(name).is_dir():
        splits = _folder_splits(name, config)
        files = [file for of_split in splits.values() for file in of_split]
        if files and all(_suffix(file) in JSON_SUFFIXES for file in files):
            return _load_json(name, splits, split, streaming, text_field)
        local = [file for file in files if Path(file).is_file()]
        return _load_split(name, split, {"path": name, "name": config}, local, streaming)
    if suffix is None:
        ending = Path(name).suffix.lower()
        if ending in _UNREAD or Path(name).is_file():
            raise ValueError(
                f"{name!r} isn't of the files that are read, {', '.join(_SUFFIXES)}; "
                f"{_UNREAD.get(ending, 'convert or rename it')}"
            )
        return _load_split(name, split, {"path": name, "name": config}, [], streaming)
    files = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True)) or [name]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"dataset {name!r} ends like a {suffix} file, but there is no such file in "
                f"{Path(name).parent.resolve()}"
            )
    if config is not None:
        raise ValueError(
            f"a local file has no configurations, got {config!r} for {name!r}: leave out config "
            "(--dataset_config)"
        )
    if suffix == ".parquet":
        source = {"path": "parquet", "data_files": {"train": list(map(glob.escape, files))}}
        return _load_split(name, split, source, files, streaming)
    return _load_json(name, {"train": files}, split, streaming, text_field)


def _suffix(name: str) -> str | None:
    """Return which kind of file the name says, None for the name of a dataset."""
    return next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), None)


def _folder_splits(name: str, config: str | None) -> dict[str, list[str]]:
    """Return the files of each split of a local folder."""
    found = load_dataset_builder(name, config).config.data_files or {}
    return {str(split): list(files) for split, files in found.items()}


def _load_split(
    name: str, split: str, source: dict[str, Any], files: list[str], streaming: bool
) -> Any:
    """Return what `datasets` reads of a source; `files` are those of a local one."""
    if files and not streaming:
        # `datasets` takes a file for the one it has read before if path and time are the same.
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, files_digest(files))
        source = {**source, "cache_dir": cache}
    try:
        return load_dataset(**source, split=split, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"dataset {name!r} can't be read: {error.__cause__ or error}") from error
    except ValueError as error:
        if "nknown split" not in str(error) and "Bad split" not in str(error):
            raise ValueError(f"dataset {name!r} can't be read: {error}") from error
        raise _no_split(name, split, error) from None


def _no_split(name: str, split: str, error: Exception) -> ValueError:
    return ValueError(
        f"dataset {name!r} has no split {split!r}: {error} Name an existing split, or a slice of "
        "one: 'train[:90%]' to train on and 'train[90%:]' to evaluate on"
    )


def _load_json(
    name: str, splits: dict[str, list[str]], split: str, streaming: bool, text_field: str
) -> Any:
    """Return the records of JSON files, what is nested in them as JSON text."""
    wanted = {part.partition("[")[0].strip() for part in split.split("+")}
    if not wanted <= splits.keys():
        raise _no_split(name, split, ValueError(f"it has {', '.join(sorted(splits))}."))
    if streaming:
        if split not in splits:
            raise _no_split(name, split, ValueError("a stream can't be sliced."))
        return _records_of_json(name, splits[split], streaming, text_field)
    whole = {one: _records_of_json(name, splits[one], streaming, text_field) for one in wanted}
    lengths = {one: len(dataset) for one, dataset in whole.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise _no_split(name, split, error) from None
    chosen = []
    for part in parts:
        length = lengths[part.splitname]
        records = range(part.from_ or 0, length if part.to is None else min(part.to, length))
        if records:
            chosen.append(whole[part.splitname].select(records))
    if not chosen:
        of_all = counted(sum(lengths.values()), "row")
        raise ValueError(f"{split!r} of {name!r} holds none of its {of_all}")
    return concatenate_datasets(chosen)


def _records_of_json(name: str, files: list[str], streaming: bool, text_field: str) -> Any:
    columns = list(dict.fromkeys(key for record in _read(files, text_field) for key in record))
    if not columns:
        raise ValueError(f"{name!r} holds no rows: it needs one JSON object a line")
    features = Features({column: Value("string") for column in columns})
    arguments: dict[str, Any] = {"files": tuple(files), "columns": tuple(columns)}
    arguments["text_field"] = text_field
    if streaming:
        return IterableDataset.from_generator(
            _text_records, features=features, gen_kwargs=arguments
        )
    version = (files_digest(files), code_digest())  # for the cache of `datasets`
    try:
        return Dataset.from_generator(
            _text_records, features=features, gen_kwargs={**arguments, "version": version}
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _text_records(
    files: tuple[str, ...], columns: tuple[str, ...], text_field: str, version: Any = None
) -> Iterator[dict[str, Any]]:
    for record in _read(files, text_field):
        yield {column: _as_text(record.get(column)) for column in columns}


def _read(files: Iterable[str], text_field: str) -> Iterator[dict[str, Any]]:
    """Yield the records of the files, with `NOT_TEXT` where there is something to list."""
    for file in files:
        for record in read_json(file):
            others = not_text(record, text_field)
            yield {**record, NOT_TEXT: others} if others else record


def _as_text(value: Any) -> str | None:
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
