"""Speed-up of a training step by one pass, against the number of turns of the chat.

The step of bench_step.py on chats with an increasing number of equal turns.

    python benchmarks/bench_turns.py --json benchmarks/results/turns.json
"""

from __future__ import annotations

from typing import Any

import datasets
from bench_step import measure
from command import add_model, add_turns, make_parser, parse

from onepass_trl.tools.bench.results import write

COLUMNS = (
    "turns",
    "n_pass_tokens",
    "one_pass_tokens",
    "token_ratio",
    "executed_over_useful",
    "n_pass_min_seconds",
    "one_pass_min_seconds",
    "speedup",
    "largest_loss_difference",
)


def print_speedup(what: str, result: dict[str, Any]) -> None:
    print(
        f"{what}: {result['speedup']:.2f} times as fast, "
        f"N-pass has {result['token_ratio']:.2f} times the tokens",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 3, 5, 8, 12, 16])
    parser.add_argument("--repeats", type=int, default=3)
    add_turns(parser)
    add_model(parser)
    args = parse(parser, arguments)
    datasets.disable_progress_bars()
    results = []
    for turns in args.turns:
        result = measure(args, turns)
        results.append({column: result[column] for column in COLUMNS})
        print_speedup(f"{turns:3} turns", result)
    if args.json:
        write(args.json, "turns", results)


if __name__ == "__main__":
    main()
