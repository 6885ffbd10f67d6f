"""Times the CPU kernel beside SDPA, dense and causal, on one row of a multi-turn chat.

    python benchmarks/bench_attention_cpu.py --json benchmarks/results/attention_cpu.json

All run interleaved in one process; the minimum and the median over the repeats are reported. SDPA
causal computes something else (every token sees all before it): it is the roof that dense code
without knowledge of the tree can reach.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write
from torch import Tensor

from onepass_trl import _C
from onepass_trl.attention import tree_attention
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.visibility import num_visible_pairs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TILE = 64


def chat_visible_end(turns: int, user: int, reasoning: int, response: int) -> Tensor:
    """Return the ``(1, seq)`` `visible_end` of the order h1 r1 .. hN, then tN rN .. t1 r1."""
    trunk = turns * user + (turns - 1) * response
    branch = reasoning + response
    ends: list[int] = []
    for turn in range(turns):  # the branches stand in descending order: turn i's is the (N-i)th
        ends += [trunk + (turns - turn) * branch] * user
        ends += [trunk + (turns - turn - 1) * branch] * (response if turn < turns - 1 else 0)
    for index in range(1, turns + 1):
        ends += [trunk + index * branch] * branch
    return torch.tensor([ends], dtype=torch.int32)


def time_once(run: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    out = run()
    middle = time.perf_counter()
    torch.autograd.grad(out, leaves, dout)
    return middle - start, time.perf_counter() - middle


def summarize(times: list[tuple[float, float]]) -> dict[str, float]:
    columns = {
        "forward": [forward for forward, _ in times],
        "backward": [backward for _, backward in times],
        "total": [forward + backward for forward, backward in times],
    }
    return {
        f"{name}_{statistic.__name__}_ms": 1e3 * statistic(values)
        for name, values in columns.items()
        for statistic in (min, statistics.median)
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    visible_end = chat_visible_end(args.turns, args.user, args.reasoning, args.response)
    seq = visible_end.shape[1]
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        x = torch.randn(1, seq, heads, args.head_dim, generator=generator)
        return x.to(DTYPES[args.dtype]).transpose(1, 2)

    q, k, v = (
        normal(heads).requires_grad_() for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    dout, mask = normal(args.heads), visibility_mask(visible_end)[:, None]

    def sdpa(**options: object) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, enable_gqa=args.heads != args.kv_heads, **options
        )

    runs: dict[str, Callable[[], Tensor]] = {
        "onepass cpu": lambda: tree_attention(q, k, v, visible_end, impl="cpu"),
        "sdpa dense mask": lambda: sdpa(attn_mask=mask),
        "sdpa causal": lambda: sdpa(is_causal=True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats + 1):
        for name, run in runs.items():
            times[name].append(time_once(run, [q, k, v], dout))
    useful = num_visible_pairs(visible_end[0].numpy())
    _, partial, full = _C.tile_counts(visible_end[0], TILE, TILE)
    summaries = {name: summarize(values[1:]) for name, values in times.items()}  # less the warm-up
    own = summaries["onepass cpu"]["total_min_ms"]
    shape = {
        "seq": seq,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "dtype": args.dtype,
        "useful_share_of_causal": useful / (seq * (seq + 1) / 2),
        "executed_over_useful": (partial + full) * TILE * TILE / useful,
    }
    return [
        {"implementation": name, **shape, **times_, "times_onepass": times_["total_min_ms"] / own}
        for name, times_ in summaries.items()
    ]


def print_table(results: list[dict[str, Any]]) -> None:
    first = results[0]
    print(
        f"{first['seq']} tokens; useful: {first['useful_share_of_causal']:.3f} of causal; "
        f"executed / useful: {first['executed_over_useful']:.2f} ({TILE} x {TILE} tiles)\n"
    )
    print("| | forward ms | backward ms | total ms, min | median | x onepass |")
    print("|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['implementation']} | {row['forward_min_ms']:.1f} | "
            f"{row['backward_min_ms']:.1f} | {row['total_min_ms']:.1f} | "
            f"{row['total_median_ms']:.1f} | {row['times_onepass']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--user", type=int, default=60, help="tokens of a user message")
    parser.add_argument("--reasoning", type=int, default=260, help="tokens of a turn's reasoning")
    parser.add_argument("--response", type=int, default=150, help="tokens of a turn's response")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = measure(args)
    print_table(results)
    if args.json is not None:
        write(args.json, "attention_cpu", results)


if __name__ == "__main__":
    main()
