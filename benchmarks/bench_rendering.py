"""Time to render all passes of a conversation, against rendering and tokenizing its last view.

The last view is what inference feeds before the last assistant turn. Both are timed in turn, in one
run; the smallest of the repeats counts. N-pass tokens are the tokens of all passes together.

    python benchmarks/bench_rendering.py --data chats.jsonl --tokenizer folder --json out.json

A conversation file has one JSON object per line, with ``messages`` and optional ``tools``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from onepass_trl.chat import render_passes
from onepass_trl.tools.bench.results import write

SHARED = Path(__file__).parents[2] / "shared"


def any_missing(*paths: Path) -> bool:
    """Return whether any of the paths doesn't exist, and print which."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        print(f"skipped: {' and '.join(missing)} not found; give --data and --tokenizer")
    return bool(missing)


def seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, repeats: int
) -> dict[str, Any]:
    """Return sizes and times of one conversation."""
    messages, tools = row["messages"], row.get("tools")
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")

    def all_passes() -> Any:
        return render_passes(messages, tokenizer, tools=tools)

    def last_view() -> Any:
        return tokenizer.apply_chat_template(
            messages[:last], tools=tools, add_generation_prompt=True
        )

    passes = all_passes()  # also a warm-up
    times = [(seconds(all_passes), seconds(last_view)) for _ in range(repeats)]
    all_passes_s, last_view_s = (min(column) for column in zip(*times, strict=True))
    return {
        "conversation": row.get("id", ""),
        "turns": len(passes),
        "npass_tokens": sum(map(len, passes)),
        "last_view_tokens": len(last_view()["input_ids"]),
        "all_passes_s": round(all_passes_s, 4),
        "last_view_s": round(last_view_s, 4),
        "ratio": round(all_passes_s / last_view_s, 2),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    columns = list(results[0])
    lines = [columns, *([str(result[column]) for column in columns] for result in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "agent_long.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args(arguments)
    if any_missing(args.data, args.tokenizer):
        return
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=10**9)
    with args.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    results = [measure(row, tokenizer, args.repeats) for row in rows]
    print_table(results)
    if args.json:
        write(args.json, "rendering", results)


if __name__ == "__main__":
    main()
