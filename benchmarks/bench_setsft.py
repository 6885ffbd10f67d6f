"""Tokens and time of the cost matrix of set fine-tuning, and of a whole step, against separate
forwards.

Separate is the ordinary way: one causal forward (SDPA, no padding) for each of the K x M pairs of
forking token and trace, without gradient, and for a step also one forward and backward for each of
the M matched pairs. The model, the fused LM head and the optimizer are the same; both are timed in
turn within one run, on random tokens. A share of each trace is common to two traces.

    python benchmarks/bench_setsft.py --json benchmarks/results/setsft.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from command import add_model, make_model, make_parser, parse, print_figures
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from onepass_trl import Pass, SetSFTConfig, SetSFTTrainer
from onepass_trl.setsft.matching import match, plan_costs
from onepass_trl.setsft.traces import Trace, TraceSet
from onepass_trl.tools.bench.results import write
from onepass_trl.versions import checkpointing_option


def random_set(args: argparse.Namespace, question: int) -> TraceSet:
    """Return a set of traces of random tokens; each pair of them begins alike."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> list[int]:
        return rng.integers(4, args.vocab_size, length).tolist()

    asked = tokens(question)
    num_common = int(args.trace * args.common)
    begins = [tokens(num_common) for _ in range((args.traces + 1) // 2)]
    traces = []
    for number in range(args.traces):
        completion = begins[number // 2] + tokens(args.trace - num_common)
        ids = [*asked, 0, *completion]
        trained = np.arange(len(ids)) > question
        traces.append(Trace(Pass(ids, trained), question, number))
    return TraceSet(tuple(traces), 0)


def make_trainer(args: argparse.Namespace, folder: str) -> SetSFTTrainer:
    vocabulary = {"<eos>": 0, "<think>": 1, "a": 2, "b": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")),
        pad_token="<eos>",
        eos_token="<eos>",
    )
    config = SetSFTConfig(
        output_dir=folder,
        num_forking_tokens=args.tokens,
        matching_batch=args.tokens * args.traces,  # costs from one forward
        max_length=None,
        per_device_train_batch_size=1,
        bf16=False,
        use_cpu=True,
        **{checkpointing_option(): False},
        report_to="none",
    )
    return SetSFTTrainer(
        make_model(args),
        config,
        train_dataset=Dataset.from_list([{"prompt": "a", "completions": ["<think>b"]}]),
        processing_class=tokenizer,
    )


def separate_loss(model: torch.nn.Module, pass_: Pass) -> torch.Tensor:
    """Return the mean loss of a pass from a plain causal forward."""
    ids = torch.from_numpy(pass_.token_ids).long()[None]
    labels = torch.where(torch.from_numpy(pass_.trained), ids, -100).roll(-1, dims=1)
    log_probs = model(
        input_ids=ids, shift_labels=labels, use_cache=False, fused_lm_head=True
    ).log_probs
    return -log_probs.sum() / pass_.num_trained


def separate_costs(trainer: SetSFTTrainer, set_: TraceSet, token_ids: list[int]) -> np.ndarray:
    trainer.model.eval()
    with torch.no_grad():
        return np.array(
            [
                [separate_loss(trainer.model, trace.after(token)).item() for trace in set_.traces]
                for token in token_ids
            ]
        )


def separate_step(trainer: SetSFTTrainer, set_: TraceSet, token_ids: list[int]) -> float:
    tokens = match(separate_costs(trainer, set_, token_ids))
    trainer.model.train()
    total = 0.0
    for pass_ in set_.after([token_ids[token] for token in tokens]):
        loss = separate_loss(trainer.model, pass_) / len(set_.traces)
        loss.backward()
        total += loss.item()
    trainer.model.zero_grad()
    return total


def one_pass_step(trainer: SetSFTTrainer, set_: TraceSet) -> float:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, {"sets": [set_], "num_sets": [1]})
    loss.backward()
    trainer.model.zero_grad()
    return loss.item()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def measure(args: argparse.Namespace, trainer: SetSFTTrainer, question: int) -> dict[str, Any]:
    """Return tokens, times and differences for questions of one length."""
    set_, ids = random_set(args, question), list(trainer.forking_tokens().ids)
    runs: dict[str, Callable[[], Any]] = {
        "one_pass_costs": lambda: trainer.matching_costs(trainer.model.eval(), [set_])[0],
        "separate_costs": lambda: separate_costs(trainer, set_, ids),
        "one_pass_step": lambda: one_pass_step(trainer, set_),
        "separate_step": lambda: separate_step(trainer, set_, ids),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, Any] = {}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            seconds, values[name] = timed(run)
            if repeat:  # the first is the warm-up
                times[name].append(seconds)
    [forward] = plan_costs([set_], ids)
    separate_tokens = len(ids) * sum(len(trace.pass_) for trace in set_.traces)
    fastest = {name: min(seconds) for name, seconds in times.items()}
    token_ratio = separate_tokens / len(forward.row)
    speedup = fastest["separate_costs"] / fastest["one_pass_costs"]
    costs = values["separate_costs"]
    return {
        "forking_tokens": args.tokens,
        "traces": args.traces,
        "question_tokens": question,
        "trace_tokens": args.trace,
        "separate_tokens": separate_tokens,
        "one_pass_tokens": len(forward.row),
        "token_ratio": token_ratio,
        "separate_costs_seconds": fastest["separate_costs"],
        "one_pass_costs_seconds": fastest["one_pass_costs"],
        "costs_speedup": speedup,
        "speedup_over_token_ratio": speedup / token_ratio,
        "largest_cost_difference": float(np.abs(values["one_pass_costs"] / costs - 1).max()),
        "step_speedup": fastest["separate_step"] / fastest["one_pass_step"],
        "matching_share_of_step": fastest["one_pass_costs"] / fastest["one_pass_step"],
        "step_loss_difference": abs(values["one_pass_step"] / values["separate_step"] - 1),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=6, help="forking tokens")
    parser.add_argument("--traces", type=int, default=4)
    parser.add_argument("--questions", type=int, nargs="+", default=[60, 400, 1600])
    parser.add_argument("--trace", type=int, default=400, help="tokens of a trace")
    parser.add_argument("--common", type=float, default=0.1, help="share common to two traces")
    add_model(parser, layers=2)
    parser.add_argument("--repeats", type=int, default=8)
    args = parse(parser, None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder)
        results = [measure(args, trainer, question) for question in args.questions]
    for result in results:
        print()
        print_figures(result)
    if args.json:
        write(args.json, "setsft", results)


if __name__ == "__main__":
    main()
