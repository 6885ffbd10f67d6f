"""Datasets of conversations to datasets of rows, with `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import pyarrow.compute as compute
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from onepass_trl.data import Layout, Overflow, TokenTree, concatenate, linearize, pack
from onepass_trl.data.layout import TOKEN_COLUMNS
from onepass_trl.preparation.options import PreparationOptions, register_families
from onepass_trl.preparation.round_trip import response_template_of
from onepass_trl.preparation.rows import describe_invalid, lay_out, render_record

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

# Rows are made and packed this many at a time, so that memory stays bounded and a stream can be
# packed.
RENDER_BATCH_SIZE = 16
PACK_BATCH_SIZE = 1000

ROW_COLUMNS = (*TOKEN_COLUMNS, "num_turns")
_ROW_FEATURES = {
    **{name: List(Value("int32")) for name in TOKEN_COLUMNS},
    "weights": List(Value("float32")),
    "num_turns": Value("int32"),
}
# What was lost of a conversation, and why turns are invalid, stands in its first row. A
# conversation of which nothing is left still has one, empty row until it is counted.
_OVERFLOW_COLUMNS = tuple(asdict(Overflow()))
_RENDERED_FEATURES = {
    **_ROW_FEATURES,
    "invalid": List(Value("string")),
    **{f"overflow_{name}": Value("int64") for name in _OVERFLOW_COLUMNS},
}


def is_prepared(column_names: list[str]) -> bool:
    """Return whether a dataset with these columns already consists of rows."""
    return set(ROW_COLUMNS) <= set(column_names)


def prepare_dataset(
    dataset: AnyDataset,
    column_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    name: str,
) -> AnyDataset:
    """Return `dataset` as rows of `Layout` columns, at most ``options.max_length`` tokens each.

    Args:
        dataset: conversations in any form that `onepass_trl.chat.rows` accepts, or rows.
        column_names: its columns; they are removed.
        name: what to call the dataset in messages and progress bars ("train", "eval" ..).

    Raises:
        ValueError: if a conversation can't be rendered, or a given row is too long; the message
            names its row. If nothing is left to train.
    """
    check_no_transform(dataset, name)
    streaming = isinstance(dataset, IterableDataset)
    dataset = dataset.with_format(None)

    def described(text: str) -> dict[str, Any]:
        return {} if streaming else {"num_proc": options.num_proc, "desc": f"{text} {name} dataset"}

    if is_prepared(column_names):
        check_not_text(dataset, ROW_COLUMNS, name)
        dataset = _with_checked_lengths(dataset, options.max_length, name)
    else:
        dataset = _render(dataset, column_names, tokenizer, options, name, described)
    dataset = dataset.select_columns(list(ROW_COLUMNS))
    return pack_and_shuffle(dataset, options, _pack_batch, _ROW_FEATURES, described("Packing"))


def pack_and_shuffle(
    dataset: AnyDataset,
    options: PreparationOptions,
    pack_batch: Callable[..., dict[str, list[Any]]],
    features: Mapping[str, Any],
    described: Mapping[str, Any],
) -> AnyDataset:
    """Return the rows in numpy format, packed and shuffled as the options say.

    Args:
        dataset: the rows.
        options: their ``packing``, ``max_length`` and ``shuffle_seed``.
        pack_batch: packs a batch of columns, given `max_length` and the code's digest.
        features: of the packed rows.
        described: further arguments of ``Dataset.map``.
    """
    if options.packing:
        if options.shuffle_seed is not None:
            dataset = dataset.shuffle(seed=options.shuffle_seed)
        dataset = dataset.with_format("numpy").map(
            pack_batch,
            batched=True,
            batch_size=PACK_BATCH_SIZE,
            features=Features(features),
            fn_kwargs={"max_length": options.max_length, "code": options.code},
            **described,
        )
    if options.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=options.shuffle_seed)
    return dataset.with_format("numpy")


def check_no_transform(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise ValueError for a dataset whose rows are made when they are read."""
    if not isinstance(dataset, IterableDataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"the {name} dataset has a transform (Dataset.with_transform), and preparing it would "
            "bake the transform's present output into the rows. Apply it with Dataset.map first"
        )


def check_not_text(dataset: Dataset | IterableDataset, columns: Sequence[str], name: str) -> None:
    """Raise ValueError for prepared rows whose numbers have become text in a file of JSON."""
    for column in columns:
        if (dataset.features or {}).get(column) == Value("string"):
            raise ValueError(
                f"column {column!r} of the prepared {name} dataset is text, as a file of JSON "
                "gives it. Save prepared rows with Dataset.to_parquet, which keeps their types"
            )


def _render(
    dataset: AnyDataset,
    column_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    name: str,
    described: Callable[[str], dict[str, Any]],
) -> AnyDataset:
    """Return the rows of all conversations; what an overflow policy took away is reported."""
    if "passes" not in column_names:
        report_unverified(tokenizer, options, name)
    dataset = render_rows(
        dataset,
        column_names,
        _render_batch,
        _RENDERED_FEATURES,
        described("Rendering"),
        tokenizer=tokenizer,
        options=options,
        name=name,
    )
    if isinstance(dataset, Dataset):
        if _report_lost(dataset, options, name):
            dataset = dataset.filter(
                has_tokens, input_columns="input_ids", **described("Dropping empty rows of")
            )
        return dataset
    dataset = dataset.filter(has_tokens, input_columns="input_ids")
    if next(iter(dataset), None) is None:
        too_long = f", or longer than max_length={options.max_length}: raise it"
        raise ValueError(
            f"the {name} dataset has no row left to train: all turns are invalid"
            f"{'' if options.max_length is None else too_long}"
        )
    return dataset


def token_ids(dataset: Dataset) -> Any:
    """Return the ``input_ids`` of a prepared dataset, its own rows only, as an Arrow array of
    lists."""
    if dataset._indices is None:
        return dataset.data["input_ids"]
    return dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]


def _with_checked_lengths(dataset: AnyDataset, max_length: int | None, name: str) -> AnyDataset:
    """Return a prepared dataset, having raised for a row that is too long, or, if it is a stream,
    raising once it comes: a tree can't be cut afterwards."""
    if max_length is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            _checked_row,
            features=dataset.features,
            fn_kwargs={"max_length": max_length, "name": name},
        )
    longest = compute.max(compute.list_value_length(token_ids(dataset))).as_py() or 0
    _check_length(longest, max_length, name)
    return dataset


def _checked_row(row: dict[str, Any], max_length: int, name: str) -> dict[str, Any]:
    _check_length(len(row["input_ids"]), max_length, name)
    return row


def _check_length(length: int, max_length: int, name: str) -> None:
    if length > max_length:
        raise ValueError(
            f"a row of the prepared {name} dataset has {length} tokens, but max_length is "
            f"{max_length}: prepare the conversations with this max_length, or raise it"
        )


def report_unverified(
    tokenizer: PreTrainedTokenizerBase, options: PreparationOptions, name: str
) -> None:
    """Log why conversations aren't parsed back, if they are meant to be and aren't."""
    if options.verify_rendering is False:
        return
    template, known = tokenizer.chat_template, options.known_templates
    if isinstance(template, str) and response_template_of(tokenizer, template, known) is None:
        logger.log(
            logging.WARNING if options.verify_rendering else logging.INFO,
            "%s dataset: rendered turns aren't parsed back to compare them with their messages, "
            "since neither the tokenizer nor TRL has a response template for this chat template. "
            "To have them verified, set tokenizer.response_template",
            name,
        )


def render_rows(
    dataset: AnyDataset,
    column_names: list[str],
    render_batch: Callable[..., dict[str, list[Any]]],
    features: Mapping[str, Any],
    described: Mapping[str, Any],
    **arguments: Any,
) -> AnyDataset:
    """Return what `render_batch` makes of the rows of a dataset.

    Args:
        dataset: the rows.
        column_names: its columns; they are removed.
        render_batch: renders a batch of columns, given the rows' indices, `arguments`, the
            dataset's features, and whether to warn at once, as nothing is counted in a stream.
        features: of what it makes.
        described: further arguments of ``Dataset.map``.
        arguments: further arguments of `render_batch`.
    """
    return dataset.map(
        render_batch,
        batched=True,
        batch_size=RENDER_BATCH_SIZE,
        with_indices=True,
        remove_columns=column_names,
        features=Features(features),
        fn_kwargs={
            **arguments,
            "warn": isinstance(dataset, IterableDataset),
            "features": dataset.features,
        },
        **described,
    )


def _render_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    name: str,
    warn: bool,
    features: Features | None,
) -> dict[str, list[Any]]:
    register_families(options)
    output: dict[str, list[Any]] = {column: [] for column in _RENDERED_FEATURES}
    for position, index in enumerate(indices):
        record = {column: values[position] for column, values in batch.items()}
        try:
            rendered = render_record(
                record, tokenizer, options, features=features, verify=options.verifies(index)
            )
            _, layouts, lost = lay_out(rendered.passes, options)
        except ValueError as error:
            raise ValueError(f"row {index} of the {name} dataset: {error}") from error
        if warn and lost.num_passes:
            logger.warning(
                "row %d of the %s dataset: %s",
                index,
                name,
                _describe(lost, options.max_length, options.overflow),
            )
        invalid = [f"row {index}: {problem}" for problem in rendered.invalid]
        if warn and invalid:
            logger.warning("%s dataset: %s", name, describe_invalid(invalid))
        for number, layout in enumerate(layouts or [linearize(TokenTree())]):
            for column in ROW_COLUMNS:
                output[column].append(getattr(layout, column))
            output["invalid"].append(invalid if number == 0 else [])
            for column, count in asdict(lost if number == 0 else Overflow()).items():
                output[f"overflow_{column}"].append(count)
    return output


def _pack_batch(batch: dict[str, list[Any]], max_length: int, code: str) -> dict[str, list[Any]]:
    rows = [Layout(*values) for values in zip(*(batch[name] for name in ROW_COLUMNS), strict=True)]
    packed = [
        concatenate([rows[index] for index in group])
        for group in pack([len(row) for row in rows], max_length)
    ]
    return {name: [getattr(row, name) for row in packed] for name in ROW_COLUMNS}


def has_tokens(input_ids: Any) -> bool:
    """Return whether a row isn't that of a conversation of which nothing is left."""
    return len(input_ids) > 0


def _report_lost(dataset: Dataset, options: PreparationOptions, name: str) -> bool:
    """Log what the dataset lost; return whether some conversations have no row left."""
    table = dataset.data
    totals = {column: table[f"overflow_{column}"].to_numpy() for column in _OVERFLOW_COLUMNS}
    lost = Overflow(
        num_passes=int(totals["num_passes"].sum()),
        num_lost_turns=int(totals["num_lost_turns"].sum()),
        num_lost_tokens=int(totals["num_lost_tokens"].sum()),
        longest=int(totals["longest"].max(initial=0)),
    )
    invalid = compute.list_flatten(table["invalid"]).to_pylist()
    problems = [describe_invalid(invalid)] if invalid else []
    if lost.num_passes:
        problems.append(_describe(lost, options.max_length, options.overflow))
    for problem in problems:
        logger.warning("%s dataset: %s", name, problem)
    num_turns = table["num_turns"].to_numpy()
    if not num_turns.any():
        raise ValueError(f"the {name} dataset has no row left to train: {'. '.join(problems)}")
    return not num_turns.all()


def _describe(lost: Overflow, max_length: int | None, overflow: str) -> str:
    return (
        f"{lost.num_passes} turns are longer than max_length={max_length} (the longest with its "
        f"context: {lost.longest} tokens); overflow={overflow!r} lost {lost.num_lost_tokens} "
        f"trained tokens, {lost.num_lost_turns} turns whole. Raise max_length to {lost.longest} to "
        "keep them all"
    )
