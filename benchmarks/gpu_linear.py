"""Times linear attention on a GPU with flash-linear-attention, forward and backward.

    python benchmarks/gpu_linear.py --json benchmarks/results/linear.json

The ways of `linear_ways.py`, for a layer and for a model of four layers (`linear_model.py`), on
chats of several lengths, in bfloat16 with the heads of Qwen3.5. For each, the seconds of the first
step (compilation, tuning, what is made of the tree), the number of kernels, the time in which the
CPU issues a step, that of its kernels one after another, and that of the whole step. `token_ratio`
is what one pass can win over `n_pass`, and `speedup` what it does.

`--device cpu --tiny`, with TRITON_INTERPRET=1, tries the benchmark out; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # offline, there may be no more

import torch
from linear_model import model_ways
from linear_ways import Shape, Way, chat, ways
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.timing import repeated_seconds


def seconds_to_issue(way: Way, device: torch.device, repeats: int) -> float:
    """Return the least time in which the CPU has issued a step, that of the device left out."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        way.step()
        times.append(time.perf_counter() - begin)
    return min(times)


def kernels_of(way: Way, device: torch.device) -> dict[str, Any]:
    """Return how many kernels a step runs, and how long they take one after another."""
    if device.type != "cuda":
        return {"kernels": None, "kernels_ms": None}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        way.step()
        torch.cuda.synchronize(device)
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    microseconds = sum(event.time_range.elapsed_us() for event in events)
    return {"kernels": len(events), "kernels_ms": microseconds / 1e3}


def measure(way: Way, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the figures of a way."""
    begin = time.perf_counter()
    way.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first = time.perf_counter() - begin
    seconds = min(repeated_seconds(way.step, device, repeats=repeats, budget_s=10))
    issued = seconds_to_issue(way, device, repeats)
    figures = {"first_s": first, "issued_ms": 1e3 * issued, **kernels_of(way, device)}
    return figures | {"step_ms": 1e3 * seconds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    shape = Shape(heads=16, value_heads=32, head_dim=128, dtype=torch.bfloat16, device=args.device)
    if args.tiny:
        shape = Shape(heads=1, value_heads=1, head_dim=16, dtype=torch.float32, device=args.device)
    results: list[dict[str, Any]] = []
    for turns in args.turns:
        passes = chat(turns, tiny=args.tiny)
        of_layer = ways(passes, shape)
        of_model = model_ways(passes, shape, of_layer, tiny=args.tiny)
        for subject, of_chat in (("layer", of_layer), ("model", of_model)):
            measured = {name: measure(way, device, args.repeats) for name, way in of_chat.items()}
            n_pass = of_chat["n_pass"].num_tokens, measured["n_pass"]["step_ms"]
            for name, way in of_chat.items():
                result = {"turns": turns, "subject": subject, "way": name}
                result |= {"tokens": way.num_tokens, "steps": way.steps, **measured[name]}
                result |= {
                    "token_ratio": n_pass[0] / way.num_tokens,
                    "speedup": n_pass[1] / measured[name]["step_ms"],
                }
                results.append(result)
                print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if args.json:
        write(args.json, "gpu_linear", results)


if __name__ == "__main__":
    main()
