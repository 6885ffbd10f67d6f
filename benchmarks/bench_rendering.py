"""Time to render all passes of a conversation, against rendering and tokenizing its last view.

The last view is what inference feeds before the last assistant turn. Both are timed in turn, in one
run; the smallest of the repeats counts. N-pass tokens are the tokens of all passes together.

    python benchmarks/bench_rendering.py --data chats.jsonl --tokenizer folder --json out.json

A conversation file has one JSON object per line, with ``messages`` and optional ``tools``. With
``--turns 100 200 400 800`` chats of these lengths are made instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import SHARED, any_missing, make_parser, print_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from onepass_trl.chat import render_passes
from onepass_trl.tools.bench.results import write


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


def chat(num_turns: int) -> dict[str, Any]:
    """Return a chat in which every turn has 60 words of reasoning and 50 of content."""
    messages = []
    for turn in range(num_turns):
        question, reasoning, content = (
            " ".join(f"{word}{(turn * number) % 100}" for number in range(length))
            for word, length in (("ask", 40), ("think", 60), ("say", 50))
        )
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": reasoning, "content": content},
        ]
    return {"id": f"chat of {num_turns} turns", "messages": messages}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "agent_long.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen3")
    parser.add_argument("--turns", type=int, nargs="+", help="lengths of chats to make")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if any_missing(*([] if args.turns else [args.data]), args.tokenizer):
        return
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=10**9)
    if args.turns:
        rows = [chat(num_turns) for num_turns in args.turns]
    else:
        with args.data.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    results = [measure(row, tokenizer, args.repeats) for row in rows]
    print_table(results)
    if args.json:
        write(args.json, "rendering", results)


if __name__ == "__main__":
    main()
