"""The conversations that the arguments of a verb name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onepass_trl.cli.arguments import preparation_options
from onepass_trl.passes import Pass
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from datasets import Dataset

    from onepass_trl.chat.processing import ProcessingClass


def open_dataset(options: argparse.Namespace) -> Dataset:
    """Return the split of the dataset that the options name."""
    from onepass_trl.preparation.loading import load_conversations

    return load_conversations(options.dataset, options.dataset_split, config=options.dataset_config)


@contextmanager
def naming_record(index: int) -> Iterator[None]:
    """Let errors in a record of the dataset say which one it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {index} of the dataset: {error}") from error


def load_passes(options: argparse.Namespace, processing_class: ProcessingClass) -> list[list[Pass]]:
    """Return the passes of the first conversations that the options name, cut to ``max_length``."""
    from onepass_trl.preparation.rows import render_record

    dataset = open_dataset(options)
    preparation = preparation_options(options)
    conversations = []
    for index in range(min(options.num_conversations, len(dataset))):
        with naming_record(index):
            found = render_record(
                dataset[index], processing_class, preparation, features=dataset.features
            )
        name = f"conversation {index}"
        conversations.append(limit_length(found.passes, options.max_length, name))
    if not conversations:
        raise ValueError(f"split {options.dataset_split!r} of {options.dataset!r} has no rows")
    return conversations


def limit_length(passes: list[Pass], max_length: int | None, name: str) -> list[Pass]:
    """Return the passes cut to their first `max_length` tokens; print what that takes away."""
    from onepass_trl.data import limit_passes

    if max_length is None:
        return passes
    passes, overflow = limit_passes(passes, max_length, "truncate")
    if overflow.num_passes:
        print(
            f"{name}: {counted(overflow.num_passes, 'pass', 'passes')} cut to {max_length} tokens "
            f"(the longest has {overflow.longest}), {overflow.num_lost_turns} of them left out"
        )
    if not passes:
        raise ValueError(
            f"{name} has no trained token within --max_length {max_length}: its longest pass has "
            f"{overflow.longest} tokens; raise --max_length"
        )
    return passes
