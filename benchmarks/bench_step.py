"""Time of a training step on a multi-turn chat: `OnePassSFTTrainer` against N-pass in TRL's
`SFTTrainer`.

Both train the same random model on the same conversation with the same optimizer, in turn within
one run. N-pass is one row per assistant turn (its context masked out, causal SDPA, no padding),
with gradients accumulated over the conversation: the ordinary exact way.

    python benchmarks/bench_step.py --json benchmarks/results/step.json
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel

from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.step import measure_step
from onepass_trl.tools.bench.workload import chat_passes, random_model, small_config


def add_turns(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a chat's turns and those that every benchmark of a step has."""
    parser.add_argument("--user", type=int, default=60, help="tokens of a user message")
    parser.add_argument("--reasoning", type=int, default=260, help="tokens of a turn's reasoning")
    parser.add_argument("--response", type=int, default=150, help="tokens of a turn's response")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the result to this file")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a chat's turns and of a small model."""
    add_turns(parser)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    config = small_config(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
    )
    return random_model(config, torch.float32)


def measure(args: argparse.Namespace, turns: int) -> dict[str, object]:
    """Return the figures of a step on one chat with this number of turns."""
    result = measure_step(
        [chat_passes(turns, args.user, args.reasoning, args.response, args.vocab_size)],
        lambda: make_model(args),
        repeats=args.repeats,
        use_cpu=True,
    )
    return {**result, "speedup_over_token_ratio": result["speedup"] / result["token_ratio"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    add_shape(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    result = measure(args, args.turns)
    del result["note"]  # both ways have run
    for key, value in result.items():
        print(f"{key:26} {value:.4g}" if isinstance(value, float) else f"{key:26} {value}")
    if args.json:
        write(args.json, "step", [result])


if __name__ == "__main__":
    main()
