"""Attention of one layer on one row, timed: our implementations against their peers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onepass_trl.attention.self_check.comparison import deterministic_mode
from onepass_trl.tools.bench.peers import Inputs, Peer, make_inputs, make_peers
from onepass_trl.tools.bench.timing import (
    available_bytes,
    min_and_median,
    peak_mib,
    reason,
    seconds_of,
)
from onepass_trl.tools.bench.workload import AttentionShape
from onepass_trl.visibility import num_executed_pairs, num_visible_pairs


def measure_attention(
    visible_end: NDArray[np.int32],
    shape: AttentionShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    positions: NDArray[np.int32] | None = None,
    window: int | None = None,
    peers: Sequence[str] | None = None,
    budget_s: float = 60.0,
) -> list[dict[str, Any]]:
    """Return a flat result for each peer; all are timed in turn on the same inputs.

    Times are in milliseconds, ``times_onepass`` the time of forward and backward as a multiple of
    the first peer's; ``build`` is what is done once per batch. ``difference`` is the largest
    difference of the output from the first peer's. ``peak_mib`` is the memory that forward and
    backward take on a CUDA device. A peer that cannot run has None for figures and says why in
    ``note``.

    Args:
        visible_end: ``(seq,)`` int32 of the row.
        repeats: how often each is timed, after one run to warm up.
        positions: ``(seq,)`` int32, needed with a window.
        peers: names of those to run; by default all.
        budget_s: a peer that has taken this many seconds, warm-up included, is not run again.

    Raises:
        ValueError: if there is no peer of a name.
    """
    x = make_inputs(visible_end, shape, dtype, device, positions)
    chosen = make_peers(x, window)
    if peers is not None:
        unknown = [name for name in peers if name not in chosen]
        if unknown:
            raise ValueError(
                f"there is no peer {unknown[0]!r}, expected one of {', '.join(chosen)}"
            )
        chosen = {name: peer for name, peer in chosen.items() if name in peers}
    common = _shape_columns(visible_end, positions, window, shape, dtype)
    runs = _run_in_turn(chosen, x, repeats, budget_s)
    first = runs[next(iter(chosen))].times
    own = min((times.total for times in first if times.total is not None), default=None)
    return [{"implementation": name, **common, **_columns(run, own)} for name, run in runs.items()]


class _Times(NamedTuple):
    """Seconds of one round of a peer; None for what it doesn't do."""

    build: float | None
    forward: float
    backward: float | None

    @property
    def total(self) -> float | None:
        return None if self.backward is None else self.forward + self.backward


@dataclass
class _Run:
    """The runs of a peer."""

    note: str | None
    times: list[_Times] = field(default_factory=list)
    spent: float = 0.0
    """Seconds of everything it did."""
    difference: float | None = None
    peak_mib: float | None = None


def _run_in_turn(
    peers: dict[str, Peer], x: Inputs, repeats: int, budget_s: float
) -> dict[str, _Run]:
    """Run all peers once to warm up, then `repeats` times."""
    runs = {name: _Run(peer.note) for name, peer in peers.items()}
    running, expected = dict(peers), None
    for number in range(repeats + 1):
        for name, peer in list(running.items()):
            run = runs[name]
            begin = time.perf_counter()
            try:
                check_memory(peer, x.q.device)
                out, times = time_once(peer, x)
                if number == 0:
                    run.peak_mib = peak_mib(partial(time_once, peer, x), x.q.device)
            except (RuntimeError, ValueError) as error:  # out of memory, not supported
                runs[name] = _Run(f"not measured: {reason(error)}")
                del running[name]
                continue
            run.spent += time.perf_counter() - begin
            if number > 0:
                run.times.append(times)
                if run.spent > budget_s:
                    del running[name]
            elif peer.is_tree:
                expected = out if expected is None else expected
                run.difference = (out.float() - expected.float()).abs().max().item()
    return runs


class MemoryLimitError(RuntimeError):
    """Something would need more memory than is free."""


def check_memory(peer: Peer, device: torch.device) -> None:
    """Raise before the process is killed: a CPU grants memory first and fails later."""
    free = available_bytes(device) if device.type == "cpu" else None
    if free is not None and peer.num_bytes > free:
        raise MemoryLimitError(
            f"needs {peer.num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )


def time_once(peer: Peer, x: Inputs) -> tuple[Tensor, _Times]:
    """Return the output of a peer and the seconds that it took."""
    device = x.q.device
    out: list[Tensor] = []
    with _deterministic(peer.same_bits):
        build = None if peer.prepare is None else seconds_of(peer.prepare, device)
        with torch.set_grad_enabled(peer.has_backward):
            forward = seconds_of(lambda: out.append(peer.run()), device)
        if not peer.has_backward:
            return out[0], _Times(build, forward, None)
        backward = seconds_of(lambda: torch.autograd.grad(out[0], (x.q, x.k, x.v), x.dout), device)
    return out[0].detach(), _Times(build, forward, backward)


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    # Otherwise torch would fill outputs that kernels write anyway, which takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with deterministic_mode(enabled):
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def _columns(run: _Run, own: float | None) -> dict[str, Any]:
    """Return the figures of a peer, given the smallest total time of the first in seconds."""
    columns: dict[str, Any] = {"repeats": len(run.times)}
    for name in ("build", "forward", "backward", "total"):
        seconds = [getattr(times, name) for times in run.times]
        columns |= min_and_median(name, "ms", [1e3 * x for x in seconds if x is not None])
    total = columns["total_min_ms"]
    ratio = None if total is None or own is None else total / (1e3 * own)
    return {
        **columns,
        "times_onepass": ratio,
        "difference": run.difference,
        "peak_mib": run.peak_mib,
        "note": run.note,
    }


def _shape_columns(
    visible_end: NDArray[np.int32],
    positions: NDArray[np.int32] | None,
    window: int | None,
    shape: AttentionShape,
    dtype: torch.dtype,
) -> dict[str, Any]:
    seq, useful = visible_end.size, num_visible_pairs(visible_end, positions, window)
    return {
        "seq": seq,
        "window": window,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.d_qk,
        "dtype": str(dtype).removeprefix("torch."),
        "useful_share_of_causal": useful / (seq * (seq + 1) / 2),
        "executed_over_useful": num_executed_pairs(visible_end, positions, window) / useful,
    }
