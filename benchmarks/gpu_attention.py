"""Attention on a GPU: our kernels against FlexAttention and SDPA, on the same inputs in one run.

Causal SDPA computes something else on rows with branches (every token sees all tokens before it):
there it is the upper bound for kernels that ignore the tree, and its own work counts as useful.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gpu_rows import Row, causal_row, chat_row
from gpu_timing import median_ms, peak_mib
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from onepass_trl.attention import cuda_library, tree_attention
from onepass_trl.attention.implementations.flex import build_block_mask
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.tools.bench.timing import reason
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


def chats(turns: int, low: int, high: int) -> Callable[[int], Row]:
    return lambda seq: chat_row(seq, turns, low, high)


CASES = (
    Case("causal", causal_row, 16_384),
    Case("causal", causal_row, 32_768),
    Case("trees, segments 512-1024", chats(8, 512, 1024), 32_768),
    Case("trees, segments 64-256", chats(40, 64, 256), 32_768),
    Case("ten-turn chats", chats(10, 64, 512), 32_768),
    Case("ten-turn chats, window 1024", chats(10, 64, 512), 32_768, window=1024),
    Case("causal, window 1024", causal_row, 32_768, window=1024),
    Case("ten-turn chats, no GQA", chats(10, 64, 512), 32_768, heads=16, kv_heads=16),
    Case("causal, d 64", causal_row, 16_384, d=64),
    Case("ten-turn chats, d 64", chats(10, 64, 512), 32_768, d=64),
)
TINY = (
    Case("causal", causal_row, 100, 2, 1, 64),
    Case("ten-turn chats", chats(10, 2, 9), 150, 2, 1, 64),
    Case("ten-turn chats, window 16", chats(10, 2, 9), 150, 2, 1, 64, window=16),
)


class Tiles(NamedTuple):
    """Queries and keys of the tiles of our kernels; backward, those with most of the products."""

    forward: tuple[int, int]
    backward: tuple[int, int]


PORTABLE_TILES = Tiles((128, 64), (64, 64))
HOPPER_TILES = Tiles((128, 128), (64, 128))


class Inputs(NamedTuple):
    """Tensors of a case, fresh random numbers."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    visible_end: Tensor
    positions: Tensor


class Peer(NamedTuple):
    """Something to compare: attention, and what is built for it once per batch."""

    run: Callable[[], Tensor]
    prepare: Callable[[], object] | None
    is_causal: bool  # it computes the whole triangle
    same_bits: bool = False  # under torch.use_deterministic_algorithms


def make_inputs(case: Case, row: Row, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (1, case.seq, heads, case.d)
        x = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        return x.transpose(1, 2)

    q, k, v = (normal(n).requires_grad_() for n in (case.heads, case.kv_heads, case.kv_heads))
    metadata = (torch.from_numpy(np.ascontiguousarray(x))[None].to(device) for x in row)
    return Inputs(q, k, v, normal(case.heads), *metadata)


def sdpa_causal(x: Inputs, backend: SDPBackend | None) -> Tensor:
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            x.q, x.k, x.v, is_causal=True, enable_gqa=x.q.shape[1] != x.k.shape[1]
        )


def sdpa_dense_mask(x: Inputs, mask: list[Tensor]) -> Tensor:
    # The backends that take a mask don't support groups of heads.
    k, v = (y.repeat_interleave(x.q.shape[1] // y.shape[1], dim=1) for y in (x.k, x.v))
    return F.scaled_dot_product_attention(x.q, k, v, attn_mask=mask[0])


def make_peers(case: Case, x: Inputs, device: str) -> dict[str, Peer]:
    """Return what can be compared on a case; ours is "onepass"."""
    positions = None if case.window is None else x.positions
    options = {"positions": positions, "window": case.window}
    mask: list[Tensor] = []

    def build_mask() -> None:
        mask[:] = [visibility_mask(x.visible_end, positions, case.window)[:, None]]

    def tree(impl: str) -> Callable[[], Tensor]:
        return partial(tree_attention, x.q, x.k, x.v, x.visible_end, **options, impl=impl)

    causal = {"sdpa causal": None}
    if device == "cuda":
        causal = {
            "sdpa causal cuDNN": SDPBackend.CUDNN_ATTENTION,
            "sdpa causal FA2": SDPBackend.FLASH_ATTENTION,
        }
    plan = partial(torch.ops.onepass.tree_plan, x.visible_end, positions, case.window or 0)
    if device == "cuda":
        ours = Peer(tree("cuda"), plan, False)
        tree_peers = {"onepass": ours, "onepass, same bits": ours._replace(same_bits=True)}
    else:
        tree_peers = {"onepass": Peer(tree("cpu"), None, False)}
    return {
        **tree_peers,
        "flex": Peer(
            tree("flex"),
            partial(build_block_mask, x.visible_end, positions, case.window),
            False,
        ),
        **{
            name: Peer(partial(sdpa_causal, x, backend), None, True)
            for name, backend in causal.items()
        },
        "sdpa dense mask": Peer(partial(sdpa_dense_mask, x, mask), build_mask, False),
    }


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch's time, not the kernels'
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def our_tiles(device: str) -> Tiles:
    """Return the tiles of the kernels that run on a device (at d = 128)."""
    is_hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    portable = os.environ.get("ONEPASS_CUDA_FAMILY") == "sm80"
    return HOPPER_TILES if is_hopper and not portable else PORTABLE_TILES


def measure_peer(case: Case, row: Row, x: Inputs, peer: Peer, args: Any) -> dict[str, Any]:
    """Return the columns of one peer; TFLOP/s of useful work, 2.5 times as much in backward."""
    timing = {"device": args.device, "repeats": args.repeats, "budget_s": args.budget}
    build_ms = None if peer.prepare is None else median_ms(peer.prepare, **timing)
    causal_pairs = case.seq * (case.seq + 1) // 2
    pairs = causal_pairs if peer.is_causal else num_visible_pairs(*row, case.window)
    flop = 4 * case.d * case.heads * pairs
    leaves = (x.q, x.k, x.v)

    def forward_and_backward() -> None:
        torch.autograd.grad(peer.run(), leaves, x.dout)

    with torch.no_grad():
        forward_ms = median_ms(peer.run, **timing)
    gradients = partial(torch.autograd.grad, peer.run(), leaves, x.dout, retain_graph=True)
    backward_ms = median_ms(gradients, **timing)
    del gradients
    return {
        "build_ms": build_ms,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_tflops": flop / forward_ms / 1e9,
        "forward_tflops_with_build": flop / (forward_ms + (build_ms or 0.0)) / 1e9,
        "backward_tflops": 2.5 * flop / backward_ms / 1e9,
        "peak_mib": peak_mib(forward_and_backward, args.device),
        "unavailable": None,
    }


def measure_case(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one flat dict of results per peer; a peer that cannot run says why."""
    row = case.row(case.seq)
    x = make_inputs(case, row, args.device)
    useful = num_visible_pairs(*row, case.window)
    executed = {
        way: num_executed_pairs(*row, case.window, query_tile=queries, key_tile=keys)
        for way, (queries, keys) in our_tiles(args.device)._asdict().items()
    }
    shape = {
        "case": case.name,
        "seq": case.seq,
        "heads": f"{case.heads}:{case.kv_heads}",
        "d": case.d,
        "useful_share_of_causal": useful / (case.seq * (case.seq + 1) / 2),
        "executed_over_useful_forward": executed["forward"] / useful,
        "executed_over_useful_backward": executed["backward"] / useful,
    }
    for name, peer in make_peers(case, x, args.device).items():
        columns = dict.fromkeys(
            (
                "build_ms",
                "forward_ms",
                "backward_ms",
                "forward_tflops",
                "forward_tflops_with_build",
                "backward_tflops",
                "peak_mib",
            )
        )
        try:
            with deterministic(peer.same_bits):
                measured = measure_peer(case, row, x, peer, args)
        except (RuntimeError, ValueError) as error:  # no such backend, out of memory, not built
            measured = {**columns, "unavailable": reason(error)}
        yield {**shape, "implementation": name, **measured}
        if args.device == "cuda":
            torch.cuda.empty_cache()


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of each of the chosen cases."""
    for case in TINY if args.tiny else CASES:
        if args.seqs and case.seq not in args.seqs:
            continue
        if args.cases and args.cases not in case.name:
            continue
        print(f"attention: {case.name}, {case.seq:,} tokens, d {case.d}", flush=True)
        yield list(measure_case(case, args))


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the main figures, a line per case and peer."""
    validated = len(cuda_library.VALIDATED)
    print(f"\nuseful TFLOP/s, forward and backward; ms to build the mask ({validated} validated)")
    for row in results:
        name = f"{row['case']}, {row['seq']:,}, {row['heads']}, d {row['d']}"
        if row["unavailable"] is not None:
            print(f"{name:48} {row['implementation']:18} {row['unavailable']}")
            continue
        build = "" if row["build_ms"] is None else f"{row['build_ms']:8.3f} ms"
        print(
            f"{name:48} {row['implementation']:18} {row['forward_tflops']:7.1f} "
            f"{row['backward_tflops']:7.1f} {build}"
        )
