"""Times the CPU kernel against SDPA, dense and causal, on one row of a multi-turn chat.

    python benchmarks/bench_attention_cpu.py --json benchmarks/results/attention_cpu.json

All run interleaved in one process; the minimum and the median over the repeats are reported. Causal
SDPA computes something else (every token sees all tokens before it): it is the upper bound for
dense code that ignores the tree.
"""

from __future__ import annotations

import torch
from command import add_turns, make_parser, parse

from onepass_trl import build_tree, linearize
from onepass_trl.tools.bench.attention import measure_attention
from onepass_trl.tools.bench.peers import CAUSAL, DENSE_MASK
from onepass_trl.tools.bench.report import attention_table
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.workload import AttentionShape, chat_passes


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=8)
    add_turns(parser)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    args = parse(parser, arguments)
    passes = chat_passes(args.turns, args.user, args.reasoning, args.response, vocab_size=1000)
    results = measure_attention(
        linearize(build_tree(passes)).visible_end,
        AttentionShape(args.heads, args.kv_heads, args.head_dim, args.head_dim),
        dtype=getattr(torch, args.dtype),
        device=torch.device("cpu"),
        repeats=args.repeats,
        peers=["onepass cpu", DENSE_MASK, CAUSAL],
    )
    print(attention_table(results))
    if args.json:
        write(args.json, "attention_cpu", results)


if __name__ == "__main__":
    main()
