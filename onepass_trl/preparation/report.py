"""What preparing a dataset reports: what was left out of its rows, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self

from onepass_trl.data import Overflow
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.wording import counted

_NUM_SHOWN = 5  # invalid turns whose errors are shown


@dataclass
class Report:
    """What was lost of a record, or of several.

    Attributes:
        overflow: what an overflow policy took away.
        invalid: why no exact pass can be made of turns, or of a record, each with its record.
    """

    turn: ClassVar[str] = "turn"
    context: ClassVar[str] = "context"

    overflow: Overflow = field(default_factory=Overflow)
    invalid: list[str] = field(default_factory=list)

    def add(self, other: Self) -> None:
        """Add what was lost of other records."""
        self.overflow.add(other.overflow)
        self.invalid += other.invalid

    def lines(self, options: PreparationOptions) -> Iterator[str]:
        """Yield in words what was lost, nothing if nothing was."""
        if self.invalid:
            yield describe_invalid(self.invalid)
        lost = self.overflow
        if lost.num_passes:
            yield (
                f"{counted(lost.num_passes, f'{self.turn} is', f'{self.turn}s are')} longer than "
                f"max_length={options.max_length} (the longest with its {self.context}: "
                f"{lost.longest} tokens); overflow={options.overflow!r} lost "
                f"{counted(lost.num_lost_tokens, 'trained token')}, "
                f"{counted(lost.num_lost_turns, self.turn)} whole. "
                f"Raise max_length to {lost.longest} to keep them all"
            )

    def nothing_left(self, name: str) -> str:
        """Return in words that everything was lost of the dataset of this name."""
        return f"the {name} dataset has no row left to train"

    def to_json(self) -> str:
        """Return the report as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the report that `to_json` wrote."""
        values = json.loads(text)
        return cls(Overflow(**values.pop("overflow")), **values)


def describe_invalid(invalid: Sequence[str]) -> str:
    """Return in words which turns, or records without a readable turn, are left out and why."""
    shown = "".join(f"\n  {problem}" for problem in invalid[:_NUM_SHOWN])
    rest = len(invalid) - _NUM_SHOWN
    one, several = "turn or row, which is", "turns or rows, which are"
    return (
        f"no exact pass can be made of {counted(len(invalid), one, several)} left out:{shown}"
        + (f"\n  and {counted(rest, 'other')}" if rest > 0 else "")
    )
