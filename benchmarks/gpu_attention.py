"""Attention on a GPU: our kernels against FlexAttention and SDPA, on the same inputs in one run.

Causal SDPA computes something else on rows with branches (every token sees all tokens before it):
there it is the upper bound for kernels that ignore the tree, and its own work counts as useful.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_rows import Row, agents, causal_row, chats, filled_row, rollouts

from onepass_trl import Pass
from onepass_trl.attention import available_impls, cuda_library
from onepass_trl.tools.bench.attention import measure_attention
from onepass_trl.tools.bench.peers import CAUSAL, DENSE_MASK
from onepass_trl.tools.bench.workload import AttentionShape
from onepass_trl.visibility import num_executed_pairs, num_visible_pairs


class Case(NamedTuple):
    """One row of the table of goals."""

    name: str
    row: Callable[[int], Row]
    seq: int
    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    window: int | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.seq:,}, {self.heads}:{self.kv_heads}, d {self.d}"


def row_of(conversations: Callable[..., Iterator[list[Pass]]], *args: int) -> Callable[[int], Row]:
    return lambda seq: filled_row(seq, conversations(*args))


CASES = (
    Case("causal", causal_row, 16_384),
    Case("causal", causal_row, 32_768),
    Case("trees, segments 512-1024", row_of(chats, 8, 512, 1024), 32_768),
    Case("trees, segments 64-256", row_of(chats, 40, 64, 256), 32_768),
    Case("ten-turn chats", row_of(chats, 10, 64, 512), 32_768),
    Case("ten-turn chats, window 1024", row_of(chats, 10, 64, 512), 32_768, window=1024),
    Case("agent, 30 turns", row_of(agents, 30), 32_768),
    Case("64 rollouts of 200 after 4,000", row_of(rollouts, 4000, 64, 200), 16_384),
    Case("causal, window 1024", causal_row, 32_768, window=1024),
    Case("ten-turn chats, no GQA", row_of(chats, 10, 64, 512), 32_768, heads=16, kv_heads=16),
    Case("causal, d 64", causal_row, 16_384, d=64),
    Case("ten-turn chats, d 64", row_of(chats, 10, 64, 512), 32_768, d=64),
)
TINY = (
    Case("causal", causal_row, 100, 2, 1, 64),
    Case("ten-turn chats", row_of(chats, 10, 2, 9), 150, 2, 1, 64),
    Case("ten-turn chats, window 16", row_of(chats, 10, 2, 9), 150, 2, 1, 64, window=16),
)


ON_CPU = ("onepass cpu", DENSE_MASK, CAUSAL)  # FlexAttention compiles no window there


COLUMNS = (
    "case",
    "seq",
    "window",
    "heads",
    "kv_heads",
    "head_dim",
    "useful_share_of_causal",
    "executed_over_useful_forward",
    "executed_over_useful_backward",
    "implementation",
    "build_median_ms",
    "forward_median_ms",
    "backward_median_ms",
    "forward_tflops",
    "forward_tflops_with_build",
    "backward_tflops",
    "difference",
    "peak_mib",
    "note",
)


class Tiles(NamedTuple):
    """Queries and keys of the tiles of our kernels; backward, those with most of the products."""

    forward: tuple[int, int]
    backward: tuple[int, int]


PORTABLE_TILES = Tiles((128, 64), (64, 64))
HOPPER_TILES = Tiles((128, 128), (64, 128))


def our_tiles(device: str) -> Tiles:
    """Return the tiles of the kernels that run on a device (at d = 128)."""
    is_hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    portable = os.environ.get("ONEPASS_CUDA_FAMILY") == "sm80"
    return HOPPER_TILES if is_hopper and not portable else PORTABLE_TILES


def measure_case(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a flat dict of results per peer: times, and the rate of useful work in TFLOP/s."""
    print(f"attention: {case}", flush=True)
    row = case.row(case.seq)
    results = measure_attention(
        row.visible_end,
        AttentionShape(case.heads, case.kv_heads, case.d, case.d),
        dtype=torch.bfloat16,
        device=torch.device(args.device),
        repeats=args.repeats,
        positions=row.positions,
        window=case.window,
        peers=args.peers or (None if args.device == "cuda" else ON_CPU),
        budget_s=args.budget,
    )
    useful = num_visible_pairs(*row, case.window)
    causal = case.seq * (case.seq + 1) // 2
    executed = {
        f"executed_over_useful_{way}": num_executed_pairs(
            *row, case.window, query_tile=queries, key_tile=keys
        )
        / useful
        for way, (queries, keys) in our_tiles(args.device)._asdict().items()
    }
    for result in results:
        pairs = causal if result["implementation"].startswith(CAUSAL) else useful
        flop = 4 * case.d * case.heads * pairs
        result |= {"case": case.name, **executed, **rates(result, flop)}
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return [{column: result[column] for column in COLUMNS} for result in results]


def rates(result: dict[str, Any], flop: int) -> dict[str, float | None]:
    """Return TFLOP/s by the median times; backward has 2.5 times the operations of forward."""
    forward, backward = result["forward_median_ms"], result["backward_median_ms"]
    build = result["build_median_ms"] or 0.0
    return {
        "forward_tflops": None if forward is None else flop / forward / 1e9,
        "forward_tflops_with_build": None if forward is None else flop / (forward + build) / 1e9,
        "backward_tflops": None if backward is None else 2.5 * flop / backward / 1e9,
    }


def measurements(
    args: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Yield the name of each of the chosen cases, and what measures it."""
    for status in available_impls():
        if not status.devices:
            print(f"attention {status.name} can't be measured: {status.detail}", flush=True)
    for case in TINY if args.tiny else CASES:
        if args.seqs and case.seq not in args.seqs:
            continue
        if args.cases and args.cases not in case.name:
            continue
        yield str(case), partial(measure_case, case, args)


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the main figures, a line per case and peer."""
    build = cuda_library.BUILD
    validated = 0 if build is None else len(cuda_library.validated_kernels(build.source))
    print(f"\nuseful TFLOP/s, forward and backward; ms to build the mask ({validated} validated)")
    for row in results:
        heads = f"{row['heads']}:{row['kv_heads']}"
        name = f"{row['case']}, {row['seq']:,}, {heads}, d {row['head_dim']}"
        rates = [row["forward_tflops"], row["backward_tflops"]]
        cells = [f"{'-':>7}" if rate is None else f"{rate:7.1f}" for rate in rates]
        build = row["build_median_ms"]
        cells.append("" if build is None else f"{build:8.3f} ms")
        note = row["note"] if row["forward_tflops"] is None else ""
        print(f"{name:48} {row['implementation']:24} {' '.join(cells)} {note}")
