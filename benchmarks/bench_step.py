"""Time of a training step on a multi-turn chat: `OnePassSFTTrainer` against N-pass in TRL's
`SFTTrainer`.

Both train the same random model on the same conversation with the same optimizer, in turn within
one run. N-pass is one row per assistant turn (its context masked out, causal SDPA, no padding),
with gradients accumulated over the conversation: the ordinary exact way.

    python benchmarks/bench_step.py --json benchmarks/results/step.json
"""

from __future__ import annotations

import argparse

from command import add_model, add_turns, make_model, make_parser, parse, print_figures

from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.step import measure_step
from onepass_trl.tools.bench.workload import chat_passes


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
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    add_turns(parser)
    add_model(parser)
    args = parse(parser, arguments)
    result = measure(args, args.turns)
    del result["note"]  # both ways have run
    print_figures(result)
    if args.json:
        write(args.json, "step", [result])


if __name__ == "__main__":
    main()
