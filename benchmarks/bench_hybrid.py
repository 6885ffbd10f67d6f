"""Time of a training step of hybrid models, whose layers carry state along the row:
`OnePassSFTTrainer` against N-pass in TRL's `SFTTrainer`.

The step of bench_step.py, with models of four layers of which one attends. The others use
transformers' implementations in PyTorch, for both ways, unless fla, mamba-ssm or causal-conv1d are
installed.

    python benchmarks/bench_hybrid.py --json benchmarks/results/hybrid.json
"""

from __future__ import annotations

from typing import Any

import datasets
import torch
from bench_turns import COLUMNS, print_speedup
from command import add_turns, add_width, make_parser, parse
from transformers import AutoConfig

from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.step import measure_step
from onepass_trl.tools.bench.workload import chat_passes, random_model

LINEAR, FULL = "linear_attention", "full_attention"
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": dict(
        layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "nemotron_h": dict(
        layers_block_type=[LINEAR, "mlp", FULL, "mlp"],
        mamba_num_heads=12,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=2,
    ),
    "lfm2": dict(layer_types=["conv", "conv", "conv", FULL]),
}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    add_turns(parser)
    add_width(parser)
    args = parse(parser, arguments)
    datasets.disable_progress_bars()
    passes = chat_passes(args.turns, args.user, args.reasoning, args.response, args.vocab_size)
    results = []
    for model_type in args.models:
        config = AutoConfig.for_model(
            model_type,
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            **MODELS[model_type],
        )
        result = measure_step(
            [passes],
            lambda config=config: random_model(config, torch.float32),
            repeats=args.repeats,
            use_cpu=True,
        )
        results.append({"model": model_type, **{column: result[column] for column in COLUMNS}})
        print_speedup(model_type, result)
    if args.json:
        write(args.json, "hybrid", results)


if __name__ == "__main__":
    main()
