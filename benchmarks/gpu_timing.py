"""Times and memory of work on a device; on a CPU only to try the benchmarks out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(run: Callable[[], object], device: str, *, repeats: int, budget_s: float) -> float:
    """Return the median time of a run in milliseconds, after two to warm up.

    Args:
        run: starts the work.
        device: "cuda" measures by events on the current stream, "cpu" by the clock.
        repeats: how often at most.
        budget_s: no further repeat starts after this time.
    """
    for _ in range(2):
        run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - begin < budget_s):
        times.append(_once_ms(run, device))
    return statistics.median(times)


def _once_ms(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Return the memory that a run takes beyond what was held before; None on a CPU."""
    if device != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
