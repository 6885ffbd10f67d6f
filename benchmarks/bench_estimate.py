"""What `onepass-trl estimate` predicts for a step, against the steps of the trainers.

For each dataset, the ratio of the step times of N-pass and one pass: predicted from the operations,
predicted from the rows that `--measure` runs, and measured by running all rows in
`OnePassSFTTrainer` and all turns in TRL's `SFTTrainer`.

    python benchmarks/bench_estimate.py --data chats.jsonl .. --json out.json

The model is a small Qwen3 with random weights. Its vocabulary is the tokens that occur, so that the
LM head doesn't dominate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import SHARED, any_missing, make_parser, parse, print_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTTrainer

from onepass_trl import Pass
from onepass_trl.preparation.loading import load_conversations
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import lay_out, render_record
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.step import N_PASS, ONE_PASS, make_trainers
from onepass_trl.tools.bench.workload import labelled, random_model, small_config
from onepass_trl.tools.estimation import estimate
from onepass_trl.tools.flops import model_cost
from onepass_trl.tools.step_time import choose_probes, measure, spread

FILES = ("maths_chat", "tool_chat", "agent_short", "agent_long")


def read_passes(
    path: Path, tokenizer: PreTrainedTokenizerBase, options: PreparationOptions, max_tokens: int
) -> list[list[Pass]]:
    """Return the passes of the first conversations, together about `max_tokens` tokens of N-pass.

    Their tokens are renumbered from 0 without gaps.
    """
    dataset = load_conversations(str(path), "train")
    chats: list[list[Pass]] = []
    total = 0
    for index in range(len(dataset)):
        record = render_record(dataset[index], tokenizer, options, features=dataset.features)
        if left := lay_out(record.passes, options)[0]:
            chats.append(left)
        total += sum(map(len, left))
        if total >= max_tokens:
            break
    known = np.unique(np.concatenate([p.token_ids for passes in chats for p in passes]))
    return [
        [Pass(np.searchsorted(known, p.token_ids), p.trained) for p in passes] for passes in chats
    ]


def seconds(trainers: list[SFTTrainer], repeats: int) -> list[float]:
    """Return each trainer's time of forward and backward over its whole dataset.

    They run in turn, and the smallest time of each batch counts.
    """
    batches = [list(trainer.get_train_dataloader()) for trainer in trainers]
    times = [np.full(len(own), np.inf) for own in batches]
    for _ in range(repeats):
        for trainer, own, best in zip(trainers, batches, times, strict=True):
            num_items = trainer._get_num_items_in_batch(own, torch.device("cpu"))
            trainer.current_gradient_accumulation_steps = len(own)
            for index, batch in enumerate(own):
                start = time.perf_counter()
                trainer.training_step(trainer.model, batch, num_items)
                best[index] = min(best[index], time.perf_counter() - start)
            trainer.model.zero_grad()
    return [float(best.sum()) for best in times]


def compare(
    args: argparse.Namespace, path: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return predictions and measurement for one dataset."""
    options = PreparationOptions(
        max_length=args.max_length,
        overflow="truncate",
        train_on="all",
        packing=False,
        null_arguments="keep",
    )
    conversations = read_passes(path, tokenizer, options, args.tokens)
    rows = [{"passes": [labelled(pass_) for pass_ in passes]} for passes in conversations]
    largest = max(int(p.token_ids.max()) for passes in conversations for p in passes)
    config = small_config(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        heads=args.hidden_size // 64,
        vocab_size=largest + 1,
    )
    cost = model_cost(config)
    found = estimate(enumerate(rows), tokenizer, options, cost, scores_every_position=True)
    probes = choose_probes([rows[at] for at in spread(found.row_tokens)], tokenizer, options)
    one, n = measure(random_model(config, torch.float32), *probes, found.attention_weights)
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(
            conversations,
            lambda: random_model(config, torch.float32),
            folder,
            use_cpu=True,
            max_length=args.max_length,
        )
    one_pass_seconds, n_pass_seconds = seconds([trainers[ONE_PASS], trainers[N_PASS]], args.repeats)
    measured = n_pass_seconds / one_pass_seconds
    by_rows = n.seconds(found.n_pass) / one.seconds(found.one_pass)
    by_operations = found.flops_ratio
    return {
        "dataset": path.stem,
        "conversations": len(conversations),
        "vocabulary": config.vocab_size,
        "one_pass_tokens": found.one_pass.tokens,
        "token_ratio": found.token_ratio,
        "executed_over_useful": found.executed_over_useful,
        "one_pass_seconds": one_pass_seconds,
        "n_pass_seconds": n_pass_seconds,
        "measured_ratio": measured,
        "by_operations": by_operations,
        "error_by_operations": by_operations / measured - 1,
        "by_rows_run": by_rows,
        "error_by_rows_run": by_rows / measured - 1,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[SHARED / f"data/{name}.jsonl" for name in FILES]
    )
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen3")
    parser.add_argument("--tokens", type=int, default=20000, help="of N-pass, of each dataset")
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    args = parse(parser, arguments)

    if any_missing(*args.data, args.tokenizer):
        return
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    results = []
    for path in args.data:
        results.append(compare(args, path, tokenizer))
        print_table(results[-1:])
    if args.json:
        write(args.json, "estimate", results)


if __name__ == "__main__":
    main()
