"""How records become rows, as a trainer or a tool is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from onepass_trl.chat.families import Family, register_family, registered_families
from onepass_trl.chat.turns import TrainOn
from onepass_trl.preparation.cache import code_digest

if TYPE_CHECKING:
    from onepass_trl.preparation.round_trip import KnownTemplates

NullArguments: TypeAlias = Literal["auto", "error", "keep", "drop"]

# How many records of a dataset are parsed back unless `verify_rendering` says otherwise.
NUM_VERIFIED_RECORDS = 8


@dataclass(frozen=True)
class PreparationOptions:
    """How rows are made: see `OnePassSFTConfig` for each."""

    max_length: int | None = None
    overflow: str = "truncate"
    train_on: TrainOn = "all"
    packing: bool = False
    invalid_turns: str = "error"
    null_arguments: NullArguments = "auto"
    ignored_columns: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    verify_rendering: bool | None = None
    text_field: str = "text"
    completion_only_loss: bool | None = None
    num_proc: int | None = None
    shuffle_seed: int | None = None
    known_templates: KnownTemplates | None = None
    """How answers to a chat template are parsed, where the tokenizer doesn't say it."""
    families: tuple[Family, ...] = field(default_factory=registered_families)
    """The registered families: for the cache, and for processes that don't inherit them."""
    code: str = field(default_factory=code_digest)
    """The cache of `datasets` must not outlive the code that made its rows."""

    def verifies(self, index: int) -> bool:
        """Return whether the record at `index` is parsed back after rendering."""
        if self.verify_rendering is None:
            return index < NUM_VERIFIED_RECORDS
        return self.verify_rendering


def register_families(options: PreparationOptions) -> None:
    """Register the families of user code, also in a process that didn't inherit them."""
    for family in reversed(options.families):
        register_family(family)


def parse_train_on(value: str | Sequence[int]) -> TrainOn:
    """Return what ``train_on`` means: ``"all"``, ``"last"`` or the list of turn indices.

    Raises:
        ValueError: if it means none of these.
    """
    if value == "all":
        return "all"
    if value == "last":
        return "last"
    parsed: object = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
    if isinstance(parsed, list) and all(type(index) is int for index in parsed):
        return parsed
    raise ValueError(
        f"train_on must be 'all', 'last' or a list of turn indices such as [0, 2], got {value!r}"
    )
