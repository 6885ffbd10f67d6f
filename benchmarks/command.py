"""What the commands of the benchmarks share: flags, the data next to the repository, tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from onepass_trl.tools.bench.workload import random_model, small_config

SHARED = Path(__file__).parents[2] / "shared"


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that has the flags of every benchmark on a CPU."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the result to this file")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Return the values of the flags, and set the number of torch's threads."""
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    return args


def add_turns(parser: argparse.ArgumentParser) -> None:
    """Add the lengths of a chat's turns."""
    parser.add_argument("--user", type=int, default=60, help="tokens of a user message")
    parser.add_argument("--reasoning", type=int, default=260, help="tokens of a turn's reasoning")
    parser.add_argument("--response", type=int, default=150, help="tokens of a turn's response")


def add_width(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of a small model that its layers share."""
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--vocab-size", type=int, default=4096)


def add_model(parser: argparse.ArgumentParser, *, layers: int = 4) -> None:
    """Add the shape of a small Qwen3, for `make_model`."""
    add_width(parser)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """Return a model of this shape with random weights, always the same."""
    config = small_config(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
    )
    return random_model(config, torch.float32)


def any_missing(*paths: Path) -> bool:
    """Return whether any of the paths doesn't exist, and print which."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        print(f"skipped: {' and '.join(missing)} not found; give --data and --tokenizer")
    return bool(missing)


def print_figures(result: dict[str, Any]) -> None:
    """Print the figures of one result, a line each."""
    for key, value in result.items():
        print(f"{key:26} {value:.4g}" if isinstance(value, float) else f"{key:26} {value}")


def print_table(results: list[dict[str, Any]]) -> None:
    """Print results as a table with their figures in columns."""
    columns = list(results[0])
    lines = [columns, *([str(result[column]) for column in columns] for result in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
