"""Time to prepare a dataset of conversations, against TRL's preparation of the same records.

TRL renders and tokenizes each conversation once, in its last view; this package renders every
turn's view, merges them into a tree and lays it out. Both run as the trainers run them, in turn, in
one process, without the cache of `datasets`; the smallest of the repeats counts. A tree has more
tokens than the last view, so the ratios are of the times per token: wall-clock time, and CPU time,
which other work on the machine disturbs less.

    python benchmarks/bench_preparation.py --data chats.jsonl .. --tokenizer folder --json out.json

A conversation file has one JSON object per line, with ``messages`` and optional ``tools``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from command import SHARED, any_missing, make_parser, print_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer
from onepass_trl.tools.bench.results import write

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
    ways = {"tree": prepare_tree, "trl": prepare_last}
    result: dict[str, Any] = {"conversations": path.stem, "rows": len(dataset)}
    for way, prepare in ways.items():  # also a warm-up
        result[f"{way}_tokens"] = sum(map(len, prepare(dataset)["input_ids"]))
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, prepare in ways.items():
            begin = time.perf_counter(), time.process_time()
            prepare(dataset)
            end = time.perf_counter(), time.process_time()
            times[way].append((end[0] - begin[0], end[1] - begin[1]))
    for way, pairs in times.items():
        result[f"{way}_s"], result[f"{way}_cpu_s"] = map(min, zip(*pairs, strict=True))
    return result


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result with the ratios of the times per token, of the clock's and the CPU's."""
    tokens = result["tree_tokens"] / result["trl_tokens"]
    return {
        **{k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()},
        "ratio_per_token": round(result["tree_s"] / result["trl_s"] / tokens, 2),
        "cpu_ratio_per_token": round(result["tree_cpu_s"] / result["trl_cpu_s"] / tokens, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    files = [SHARED / "data" / f"{name}.jsonl" for name in FILES]
    parser.add_argument("--data", type=Path, nargs="+", default=files)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen3")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if any_missing(*args.data, args.tokenizer):
        return
    torch.manual_seed(0)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=10**9)
    with tempfile.TemporaryDirectory() as folder:
        prepare_tree = preparation(OnePassSFTTrainer, OnePassSFTConfig, tokenizer, folder)
        prepare_last = preparation(SFTTrainer, SFTConfig, tokenizer, folder)
        results = [measure(path, prepare_tree, prepare_last, args.repeats) for path in args.data]
    total = {key: sum(r[key] for r in results) for key in results[0] if key != "conversations"}
    results = [with_ratios(r) for r in [*results, {"conversations": "all", **total}]]
    print_table(results)
    if args.json:
        write(args.json, "preparation", results)


if __name__ == "__main__":
    main()
