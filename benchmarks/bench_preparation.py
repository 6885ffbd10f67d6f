"""Time to prepare a dataset of conversations, beside TRL's preparation of the same rows.

TRL renders and tokenizes each conversation once, in its last view; this package renders every
turn's view, merges them to a tree and lays it out. Both run as the trainers run them, in turn, in
one process, without the cache of `datasets`; the smallest of the repeats counts. A tree has more
tokens than the last view, so the ratio is of the times per token.

    python benchmarks/bench_preparation.py --data chats.jsonl .. --tokenizer folder --json out.json

A conversation file holds one JSON object a line, with ``messages`` and optional ``tools``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from bench_rendering import SHARED, print_table
from record import write
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer

FILES = ("maths_chat", "tool_chat", "agent_short", "agent_long")

COLUMNS = ("messages", "tools")


def tiny_model(vocab_size: int) -> Qwen3ForCausalLM:
    """Return the smallest model that a trainer accepts; it isn't run."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2**20,
        )
    )


def preparation(
    kind: type[SFTTrainer], config: type[SFTConfig], tokenizer: PreTrainedTokenizerBase, folder: str
) -> Callable[[datasets.Dataset], datasets.Dataset]:
    """Return a function that prepares a dataset as the trainer does it."""
    args = config(folder, max_length=None, use_cpu=True, bf16=False, report_to="none")
    seed = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    trainer = kind(tiny_model(len(tokenizer)), args, train_dataset=seed, processing_class=tokenizer)

    def prepare(dataset: datasets.Dataset) -> datasets.Dataset:
        return trainer._prepare_dataset(dataset, tokenizer, args, False, None, "train")

    return prepare


def measure(
    path: Path, prepare_tree: Callable[..., Any], prepare_last: Callable[..., Any], repeats: int
) -> dict[str, Any]:
    """Return sizes and times of one file of conversations."""
    dataset = datasets.load_dataset("json", data_files=str(path), split="train")
    dataset = dataset.select_columns([c for c in dataset.column_names if c in COLUMNS])
    tokens, times = [], []
    for prepare in (prepare_tree, prepare_last):  # also a warm-up
        tokens.append(sum(map(len, prepare(dataset)["input_ids"])))
    for _ in range(repeats):
        for prepare in (prepare_tree, prepare_last):
            begin = time.perf_counter()
            prepare(dataset)
            times.append(time.perf_counter() - begin)
    tree_s, last_s = min(times[::2]), min(times[1::2])
    return {
        "conversations": path.stem,
        "rows": len(dataset),
        "tree_tokens": tokens[0],
        "trl_tokens": tokens[1],
        "onepass_s": round(tree_s, 3),
        "trl_s": round(last_s, 3),
        "ratio_of_times": round(tree_s / last_s, 2),
        "ratio_per_token": round(tree_s / tokens[0] / (last_s / tokens[1]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = [SHARED / "data" / f"{name}.jsonl" for name in FILES]
    parser.add_argument("--data", type=Path, nargs="+", default=files)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args()
    missing = [str(path) for path in (*args.data, args.tokenizer) if not path.exists()]
    if missing:
        print(f"skipped: {' and '.join(missing)} not found; give --data and --tokenizer")
        return
    torch.manual_seed(0)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=10**9)
    with tempfile.TemporaryDirectory() as folder:
        prepare_tree = preparation(OnePassSFTTrainer, OnePassSFTConfig, tokenizer, folder)
        prepare_last = preparation(SFTTrainer, SFTConfig, tokenizer, folder)
        results = [measure(path, prepare_tree, prepare_last, args.repeats) for path in args.data]
    print_table(results)
    if args.json:
        write(args.json, "preparation", results)


if __name__ == "__main__":
    main()
