"""Times and memory of one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run, until the device has finished its work.

    On CUDA devices by events on the current stream, which time the device rather than the call.
    """
    _synchronize(device)
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def repeated_seconds(
    run: Callable[[], object], device: torch.device, *, repeats: int, budget_s: float
) -> list[float]:
    """Return the seconds of repeated runs, after one to warm up.

    After `budget_s` seconds of runs no further one begins; one is always timed.
    """
    run()
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) < budget_s):
        times.append(seconds_of(run, device))
    return times


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the memory that a run takes beyond what was held before it; None except on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def min_and_median(name: str, unit: str, times: Sequence[float]) -> dict[str, float | None]:
    """Return minimum and median as columns of a result, None if nothing was timed.

    >>> min_and_median("forward", "ms", [3.0, 1.0, 2.0])
    {'forward_min_ms': 1.0, 'forward_median_ms': 2.0}
    """
    return {
        f"{name}_min_{unit}": min(times, default=None),
        f"{name}_median_{unit}": statistics.median(times) if times else None,
    }


def available_bytes(device: torch.device) -> int | None:
    """Return the free bytes of the device's memory, None if that isn't known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(sizes["MemAvailable"].split()[0])


def reason(error: BaseException) -> str:
    """Return the first line of an error, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]
