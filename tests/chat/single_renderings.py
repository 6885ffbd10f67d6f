"""What training on one rendering makes of the turns of real conversations: a table of docs/why.md.

python -m tests.chat.single_renderings    # counts, some minutes, and writes the table
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.tools.estimation import estimate
from onepass_trl.tools.single_rendering import ALL_TURNS, LAST_TURN, REASONING_KEPT
from tests.chat.coverage import FILES, read_conversations
from tests.chat.families import CASES
from tests.chat.tokenizers import make_real_tokenizer
from tests.pages import with_part

RECORD = Path(__file__).with_name("single_renderings.json")
PAGE = Path(__file__).parents[2] / "docs" / "why.md"
FAMILIES = ("Qwen3", "Qwen3.6", "DeepSeek-R1-distill", "DeepSeek-V3", "gpt-oss", "GLM-4 MoE")
FAMILIES += ("Gemma 4",)
OPTIONS = {"null_arguments": "keep", "invalid_turns": "drop"}

Counts = Mapping[str, Mapping[str, int]]  # of `Training`, for each way


def count(name: str) -> Counts:
    """Return what becomes of the turns of all real conversations with a family's template."""
    case = CASES[name]
    records = enumerate(chain(*map(read_conversations, FILES)))
    options = PreparationOptions(chat_template_kwargs=case.kwargs, **OPTIONS)
    ways = estimate(records, make_real_tokenizer(case), options).single_rendering
    return {way: asdict(training) for way, training in ways.items()}


def table(record: Mapping[str, Counts]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield (
        "| template | turns | all labelled: as at inference | without their reasoning "
        "| last labelled: as at inference | not trained "
        "| reasoning kept: as at inference | in another context |"
    )
    yield "|" + "---|" * 8
    for name, ways in record.items():
        turns = ways[ALL_TURNS]["turns"]
        cells = [
            ways[way][what]
            for way, what in (
                (ALL_TURNS, "faithful"),
                (ALL_TURNS, "unreasoned"),
                (LAST_TURN, "faithful"),
                (LAST_TURN, "untrained"),
                (REASONING_KEPT, "faithful"),
                (REASONING_KEPT, "displaced"),
            )
        ]
        shares = " | ".join(f"{100 * cell / turns:.0f} %" for cell in cells)
        yield f"| {name} | {turns:,} | {shares} |"


def page_with_table(page: str) -> str:
    """Return the page with the table of the record."""
    record = json.loads(RECORD.read_text("utf-8"))
    return with_part(page, "single renderings", "\n".join(table(record)))


def main() -> None:
    """Count, and write the record and the table."""
    record = {}
    for name in FAMILIES:
        record[name] = count(name)
        print(name, record[name], flush=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    PAGE.write_text(page_with_table(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
