"""The tables of docs/chat_formats.md, from the templates and from the record of what they cover.

python -m tests.chat.coverage    # renders all real conversations, 20 minutes
python -m tests.chat.table       # writes the tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onepass_trl.chat import ChatFormatError, render_passes
from onepass_trl.chat.families import family_of
from onepass_trl.chat.template import Template
from tests.chat.coverage import RECORD, as_served
from tests.chat.families import CASES, Case
from tests.chat.golden import CONVERSATIONS
from tests.chat.tokenizers import make_small_tokenizer
from tests.pages import with_part

PAGE = Path(__file__).parents[2] / "docs" / "chat_formats.md"
# Template arguments that decide which reasoning later contexts hold.
_HISTORY_SWITCHES = {"preserve_thinking": True, "truncate_history_thinking": False}
_TOKENIZERS = {"qwen3": "Qwen3", "deepseek-r1": "DeepSeek-R1", "gpt-oss": "gpt-oss"}


def kept_reasoning(case: Case, tokenizer: Any, **switches: Any) -> str:
    """Return whose reasoning is in the context of a later turn, found by rendering probes."""
    _, earlier, question, _ = CONVERSATIONS["two turns"]
    step, result = CONVERSATIONS["a tool"][1:3]
    messages = [CONVERSATIONS["two turns"][0], earlier, question]
    probes = {"all turns": (messages, earlier), "tool steps": ([*messages, step, result], step)}
    kept = [
        name
        for name, (context, message) in probes.items()
        if message["reasoning_content"] in _context(case, tokenizer, context, switches)
    ]
    return ", ".join(kept[:1] or ["none"])


def _context(case: Case, tokenizer: Any, messages: list[Any], switches: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        [as_served(message, case) for message in messages],
        add_generation_prompt=True,
        tokenize=False,
        **{**case.kwargs, **switches},
    )
    return text


def _history(case: Case) -> str:
    """Return whose reasoning later contexts hold, and the switch that changes it."""
    if not case.reasoning:
        return "no reasoning"
    tokenizer = make_small_tokenizer(case)
    kept = kept_reasoning(case, tokenizer)
    for name, value in _HISTORY_SWITCHES.items():
        if name in tokenizer.chat_template:
            other = kept_reasoning(case, tokenizer, **{name: value})
            if other != kept:
                kept += f"; {other} with `{name}={value}`"
    return kept


def _twice(case: Case) -> str:
    """Return what occurs twice in a row: completions that no later pass continues."""
    twice = []
    tokenizer = make_small_tokenizer(case)
    for name, what in (("two turns", "answers"), ("a tool", "tool steps")):
        messages = CONVERSATIONS[name]
        if not case.reasoning:
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        try:
            first, second = render_passes(messages, tokenizer, chat_template_kwargs=case.kwargs)
        except ChatFormatError:
            continue
        if first.token_ids.tolist() != second.token_ids[: len(first)].tolist():
            twice.append(what)
    return ", ".join(twice) or "nothing"


def families_table() -> Iterator[str]:
    """Yield the lines of the table of families."""
    record = json.loads(RECORD.read_text("utf-8"))
    columns = ["family", "rendered by", "reasoning in later contexts", "occurs twice"]
    columns += ["turns rendered", "contexts equal", "parsed back", "N-pass / one pass", "tokenizer"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for case in CASES.values():
        counts = record[case.name]
        rendered = counts["num_turns"] - sum(counts["refused"].values())
        switch = ", ".join(f"`{name}={value}`" for name, value in case.kwargs.items())
        cells = [
            case.name + (f" ({switch})" if switch else ""),
            family_of(Template(make_small_tokenizer(case), None, case.kwargs)).name,
            _history(case),
            _twice(case),
            f"{rendered:,} of {counts['num_turns']:,}",
            f"{counts['equal_contexts']:,}",
            f"{counts['round_trips']:,}",
            f"{counts['npass_tokens'] / counts['onepass_tokens']:.1f}",
            _TOKENIZERS[case.tokens.folder] + ("" if case.tokens.is_own else " + tokens"),
        ]
        yield "| " + " | ".join(cells) + " |"


def exceptions_table() -> Iterator[str]:
    """Yield the lines of the table of turns that aren't rendered or aren't parsed back."""
    record = json.loads(RECORD.read_text("utf-8"))
    yield "| family | turns refused, for what the template doesn't write | turns not parsed back |"
    yield "|---|---|---|"
    for name in CASES:
        reasons = [
            "; ".join(f"{reason}: {number}" for reason, number in sorted(counts.items()))
            for counts in (record[name]["refused"], record[name]["misread"])
        ]
        if any(reasons):
            yield f"| {name} | {reasons[0]} | {reasons[1]} |"


def page_with_tables(page: str) -> str:
    """Return the page with its tables as they are now."""
    for name, lines in (("families", families_table()), ("exceptions", exceptions_table())):
        page = with_part(page, name, "\n".join(lines))
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text("utf-8")), "utf-8")
