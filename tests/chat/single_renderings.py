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
FAMILIES = (
    "Qwen3",
    "Qwen3.6",
    "DeepSeek-R1-distill",
    "DeepSeek-V3",
    "gpt-oss",
    "GLM-4 MoE",
    "Gemma 4",
)
_COLUMNS = {
    ALL_TURNS: "all turns labelled",
    LAST_TURN: "last turn labelled",
    REASONING_KEPT: "reasoning kept, all labelled",
}
_LOST = {
    "untrained": "not trained",
    "unreasoned": "without their reasoning",
    "displaced": "in another context",
}
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
    yield f"| template | turns | {' | '.join(_COLUMNS.values())} |"
    yield "|" + "---|" * (2 + len(_COLUMNS))
    for name, ways in record.items():
        turns = ways[ALL_TURNS]["turns"]
        cells = [_cell(ways[way], turns) for way in _COLUMNS]
        yield f"| {name} | {turns:,} | {' | '.join(cells)} |"


def _cell(counts: Mapping[str, int], turns: int) -> str:
    """Return the share of faithful turns, and what becomes of the others."""
    parts = [f"**{100 * counts['faithful'] / turns:.0f} %**"]
    parts += [
        f"{100 * counts[name] / turns:.0f} % {text}" for name, text in _LOST.items() if counts[name]
    ]
    return ", ".join(parts)


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
