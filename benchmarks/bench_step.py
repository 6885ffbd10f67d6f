"""Time of a training step on multi-turn chats: `OnePassSFTTrainer` against N-pass in TRL's
`SFTTrainer`.

Both train the same random model on the same conversations with the same optimizer, in turn within
one run. N-pass is one row per assistant turn (its context masked out, causal SDPA, no padding), its
gradients accumulated over the
conversation: the ordinary exact way.

    python benchmarks/bench_step.py --json benchmarks/results/step.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from record import write
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, Pass


def chat(num_turns: int, user: int, reasoning: int, response: int, vocab_size: int) -> list[Pass]:
    """Passes of a chat of random tokens whose reasoning is hidden from later turns."""
    rng = np.random.default_rng(0)
    trunk: list[int] = []
    passes = []
    for _ in range(num_turns):
        trunk += rng.integers(0, vocab_size, user).tolist()
        completion = rng.integers(0, vocab_size, reasoning + response).tolist()
        passes.append(Pass(trunk + completion, [0] * len(trunk) + [1] * len(completion)))
        trunk += completion[reasoning:]
    return passes


def make_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
    )
    return Qwen3ForCausalLM(config)


def make_trainers(
    args: argparse.Namespace, passes: list[Pass], folder: str
) -> dict[str, SFTTrainer]:
    labelled = [
        {
            "input_ids": pass_.token_ids.tolist(),
            "labels": np.where(pass_.trained, pass_.token_ids, -100).tolist(),
        }
        for pass_ in passes
    ]
    settings = dict(
        output_dir=folder,
        max_length=None,
        per_device_train_batch_size=1,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to="none",
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    return {
        "one pass": OnePassSFTTrainer(
            make_model(args),
            OnePassSFTConfig(**settings),
            train_dataset=Dataset.from_list([{"passes": labelled}]),
            processing_class=tokenizer,
        ),
        "N-pass": SFTTrainer(
            make_model(args),
            SFTConfig(**settings, gradient_accumulation_steps=len(passes)),
            train_dataset=Dataset.from_list(labelled),
            processing_class=tokenizer,
        ),
    }


def seconds_per_step(trainer: SFTTrainer, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Return the time of one optimizer step over the conversation, and its loss."""
    batches = list(trainer.get_train_dataloader())
    start = time.perf_counter()
    num_items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, num_items).item() for batch in batches)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--user", type=int, default=60, help="tokens of a user message")
    parser.add_argument("--reasoning", type=int, default=260, help="tokens of a turn's reasoning")
    parser.add_argument("--response", type=int, default=150, help="tokens of a turn's response")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    passes = chat(args.turns, args.user, args.reasoning, args.response, args.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(args, passes, folder)
    optimizers = {
        name: torch.optim.AdamW(trainer.model.parameters(), lr=1e-4)
        for name, trainer in trainers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(args.repeats + 1):  # the first is the warm-up
        for name, trainer in trainers.items():
            seconds, loss = seconds_per_step(trainer, optimizers[name])
            times[name].append(seconds)
            losses[name].append(loss)

    n_pass_tokens = sum(map(len, passes))
    one_pass_tokens = len(trainers["one pass"].train_dataset[0]["input_ids"])
    fastest = {name: min(values[1:]) for name, values in times.items()}
    result = {
        "turns": args.turns,
        "n_pass_tokens": n_pass_tokens,
        "one_pass_tokens": one_pass_tokens,
        "token_ratio": n_pass_tokens / one_pass_tokens,
        "n_pass_seconds_min": fastest["N-pass"],
        "n_pass_seconds_median": statistics.median(times["N-pass"][1:]),
        "one_pass_seconds_min": fastest["one pass"],
        "one_pass_seconds_median": statistics.median(times["one pass"][1:]),
        "speedup": fastest["N-pass"] / fastest["one pass"],
        "largest_loss_difference": max(
            abs(a - b) / b for a, b in zip(losses["one pass"], losses["N-pass"], strict=True)
        ),
    }
    result["speedup_over_token_ratio"] = result["speedup"] / result["token_ratio"]
    for key, value in result.items():
        print(f"{key:26} {value:.4g}" if isinstance(value, float) else f"{key:26} {value}")
    if args.json:
        write(args.json, "step", [result])


if __name__ == "__main__":
    main()
