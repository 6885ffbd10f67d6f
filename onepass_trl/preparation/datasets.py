"""Datasets of records to datasets of rows, with `datasets`: the same for every maker of rows."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import pyarrow
import pyarrow.compute as compute
from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, Value

from onepass_trl.chat.errors import TOO_DEEP
from onepass_trl.chat.processing import ProcessingClass, chat_templates
from onepass_trl.data import pack
from onepass_trl.preparation.options import PreparationOptions, register_families
from onepass_trl.preparation.report import Report
from onepass_trl.preparation.round_trip import response_template_of

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

# Rows are made and packed this many at a time, so that memory stays bounded and a stream can be
# packed.
RENDER_BATCH_SIZE = 16
PACK_BATCH_SIZE = 1000
CHECK_BATCH_SIZE = 1000


@dataclass(frozen=True)
class Maker(ABC):
    """How rows are made of the records of a dataset, and of rows longer ones.

    A row is a mapping from columns to their values, one of them the list ``input_ids``.

    Attributes:
        processing_class: a tokenizer or processor with a chat template.
        options: how rows are made.
    """

    features: ClassVar[Mapping[str, Any]]
    """The columns that a row needs, and their types."""
    written_features: ClassVar[Mapping[str, Any]]
    """Those, and columns for others to read."""
    report: ClassVar[type[Report]] = Report

    processing_class: ProcessingClass
    options: PreparationOptions

    @abstractmethod
    def make(
        self, record: Mapping[str, Any], index: int, features: Features | None
    ) -> tuple[list[Mapping[str, Any]], Report]:
        """Return the rows of a record, in all written columns, and a report on what was left out.

        Raises:
            ValueError: if rows can't be made of it.
        """

    @abstractmethod
    def length(self, row: Mapping[str, Any]) -> int:
        """Return the tokens of a row, at most ``options.max_length``."""

    @abstractmethod
    def join(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return one row, in all written columns, that holds several; an empty one for none."""

    @staticmethod
    @abstractmethod
    def check_rows(rows: pyarrow.Table, name: Callable[[int], str]) -> None:
        """Raise ValueError unless rows that were given are such as a maker makes.

        Args:
            rows: of the maker's columns.
            name: returns what to call a row, given its number among these.
        """

    @abstractmethod
    def check_prepared(self, rows: pyarrow.Table, name: str) -> None:
        """Raise ValueError for rows that don't suit the options: they can't be changed any more."""


def prepare_dataset(
    dataset: AnyDataset, column_names: Sequence[str], maker: Maker, name: str
) -> AnyDataset:
    """Return `dataset` as the rows that the maker makes, packed and shuffled as its options say.

    Args:
        dataset: records, or rows of the maker's columns.
        column_names: its columns; they are removed.
        name: what to call the dataset in messages and progress bars ("train", "eval" ..).

    Raises:
        ValueError: if no rows can be made of a record, or a given row is too long; the message
            names its record. If nothing is left to train.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"the {name} dataset has a transform (Dataset.with_transform), and preparing it would "
            "bake the transform's present output into the rows. Apply it with Dataset.map first"
        )
    dataset = dataset.with_format(None)
    columns = list(maker.written_features)
    if maker.features.keys() <= set(column_names):
        dataset = _checked(dataset, maker, name)
        columns = [column for column in columns if column in column_names]
    else:
        dataset = _made(dataset, column_names, maker, name)
    dataset = dataset.select_columns(columns)
    return _packed_and_shuffled(dataset, maker, name)


def _described(dataset: Any, maker: Maker, text: str) -> dict[str, Any]:
    """Return the arguments of ``Dataset.map`` that streams don't have."""
    if isinstance(dataset, IterableDataset):
        return {}
    return {"num_proc": maker.options.num_proc, "desc": text}


def _made(dataset: AnyDataset, column_names: Sequence[str], maker: Maker, name: str) -> AnyDataset:
    """Return the rows of all records; what was lost of them is reported."""
    if "passes" not in column_names:
        _report_unverified(maker, name)
    streaming = isinstance(dataset, IterableDataset)
    if (
        dataset.features is not None
        and (stored := _as_stored(dataset.features)) != dataset.features
    ):
        dataset = dataset.cast(Features(stored))
    rows = dataset.map(
        _make_batch,
        batched=True,
        batch_size=RENDER_BATCH_SIZE,
        with_indices=True,
        remove_columns=list(column_names),
        features=Features({**maker.written_features, "report": Value("string")}),
        # Of a stream nothing is counted: what is lost is said at once.
        fn_kwargs={"maker": maker, "name": name, "features": dataset.features, "warn": streaming},
        **_described(dataset, maker, f"Rendering {name} dataset"),
    )
    report = maker.report()
    problems = []
    if isinstance(rows, Dataset):
        for text in rows.data["report"].drop_null().to_pylist():
            report.add(maker.report.from_json(text))
        problems = list(report.lines(maker.options))
        for problem in problems:
            logger.warning("%s dataset: %s", name, problem)
        if compute.min(compute.list_value_length(rows.data["input_ids"])).as_py():
            return rows
    rows = rows.filter(  # a record of which nothing is left has an empty row
        len,
        input_columns="input_ids",
        **_described(rows, maker, f"Dropping empty rows of {name} dataset"),
    )
    if next(iter(rows), None) is None:
        longer = f", or longer than max_length={maker.options.max_length}: raise it"
        reason = ". ".join(problems) or (
            f"all {report.turn}s are invalid{'' if maker.options.max_length is None else longer}"
        )
        raise ValueError(f"{report.nothing_left(name)}: {reason}")
    return rows


def _as_stored(feature: Any) -> Any:
    """Return the type of columns, or of their values, with images as they are stored, not decoded.

    Rows refer to the images of their records, and need none of their pixels.
    """
    if isinstance(feature, Mapping):
        return {name: _as_stored(part) for name, part in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_as_stored(feature.feature))
    return dataclasses.replace(feature, decode=False) if isinstance(feature, Image) else feature


def _make_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    maker: Maker,
    name: str,
    features: Features | None,
    warn: bool,
) -> dict[str, list[Any]]:
    """Return the rows of some records, and in the first of each what is to be reported of it.

    A record that lost everything keeps an empty row until it is counted.
    """
    register_families(maker.options)
    output: dict[str, list[Any]] = {column: [] for column in (*maker.written_features, "report")}
    for position, index in enumerate(indices):
        record = {column: values[position] for column, values in batch.items()}
        try:
            rows, report = maker.make(record, index, features)
        except ValueError as error:
            raise ValueError(f"row {index} of the {name} dataset: {error}") from error
        except RecursionError:
            raise ValueError(f"row {index} of the {name} dataset: {TOO_DEEP}") from None
        problems = list(report.lines(maker.options))
        for problem in problems if warn else ():
            logger.warning("row %d of the %s dataset: %s", index, name, problem)
        text = report.to_json() if problems else None
        for row in rows or [maker.join([])]:
            for column in maker.written_features:
                output[column].append(row[column])
            output["report"].append(text)
            text = None
    return output


def _report_unverified(maker: Maker, name: str) -> None:
    """Log why turns aren't parsed back, if they are meant to be and aren't."""
    options, template = maker.options, chat_templates(maker.processing_class)
    if options.verify_rendering is False or not isinstance(template, str):
        return
    if response_template_of(maker.processing_class, template, options.known_templates) is None:
        logger.log(
            logging.WARNING if options.verify_rendering else logging.INFO,
            "%s dataset: rendered turns aren't parsed back to compare them with their messages, "
            "since neither the tokenizer nor TRL has a response template for this chat template. "
            "To have them verified, set tokenizer.response_template",
            name,
        )


def _checked(dataset: AnyDataset, maker: Maker, name: str) -> AnyDataset:
    """Return prepared rows; raise if one doesn't suit the options (in a stream, when read)."""
    for column in maker.features:
        if (dataset.features or {}).get(column) == Value("string"):
            raise ValueError(
                f"column {column!r} of the prepared {name} dataset is text, as a file of JSON "
                "gives it. Save prepared rows with Dataset.to_parquet, which keeps their types"
            )
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            _checked_row,
            with_indices=True,
            features=dataset.features,
            fn_kwargs={"maker": maker, "name": name},
        )
    for rows, name_of in named_rows(dataset, maker.features, name):
        maker.check_rows(rows, name_of)
        maker.check_prepared(rows, name)
    return dataset


def named_rows(
    dataset: Dataset, columns: Iterable[str], name: str
) -> Iterator[tuple[pyarrow.Table, Callable[[int], str]]]:
    """Yield prepared rows of a dataset, and what returns the name of one of them."""
    tables = dataset.select_columns(list(columns)).with_format("arrow")
    first = 0
    for rows in tables.iter(CHECK_BATCH_SIZE):
        yield rows, partial(_name_of_row, first=first, name=name)
        first += len(rows)


def _name_of_row(number: int, first: int, name: str) -> str:
    return f"row {first + number} of the prepared {name} dataset"


def _checked_row(row: dict[str, Any], index: int, maker: Maker, name: str) -> dict[str, Any]:
    rows = pyarrow.table({column: [row[column]] for column in maker.features})
    maker.check_rows(rows, partial(_name_of_row, first=index, name=name))
    maker.check_prepared(rows, name)
    return row


def _packed_and_shuffled(dataset: AnyDataset, maker: Maker, name: str) -> AnyDataset:
    """Return the rows in numpy format, packed and shuffled as the options say."""
    seed = maker.options.shuffle_seed
    if maker.options.packing:
        if seed is not None:
            dataset = dataset.shuffle(seed=seed)
        dataset = dataset.with_format("numpy").map(
            _pack_batch,
            batched=True,
            batch_size=PACK_BATCH_SIZE,
            features=Features(maker.written_features),
            fn_kwargs={"maker": maker},
            **_described(dataset, maker, f"Packing {name} dataset"),
        )
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    return dataset.with_format("numpy")


def _pack_batch(batch: Mapping[str, list[Any]], maker: Maker) -> dict[str, list[Any]]:
    columns = [batch[column] for column in maker.features]
    rows = [dict(zip(maker.features, values, strict=True)) for values in zip(*columns, strict=True)]
    assert maker.options.max_length is not None  # the trainer has seen to it
    groups = pack(list(map(maker.length, rows)), maker.options.max_length)
    packed = [maker.join([rows[index] for index in group]) for group in groups]
    return {column: [row[column] for row in packed] for column in maker.written_features}
