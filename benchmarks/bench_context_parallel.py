"""Peak memory of a training step whose row is divided among several processes.

A row of a long chat goes forward and backward through a small model, with activation checkpointing,
in one process and in groups of 2 and 4 (context parallelism, `cp_size`). A figure is the peak
memory of a step beyond what the process held before, for the process with the highest peak; each
process has all weights. The processes share the CPU, so seconds are comparable only up to its
number of cores. Linux with glibc only.

    python benchmarks/bench_context_parallel.py --json benchmarks/results/context_parallel.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_memory import held_kib
from command import make_parser, parse

from onepass_trl import OnePassCollator, build_tree, linearize
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.data.collator import model_inputs
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.workload import chat_passes, random_model, small_config
from onepass_trl.training.context_parallel import forward_in_pieces
from onepass_trl.training.lm_head import add_fused_lm_head
from onepass_trl.versions import checkpointing_option

VOCAB_SIZE = 512  # the head's tiles have a size that is independent of the row
TURN = {"user": 60, "reasoning": 260, "response": 150, "vocab_size": VOCAB_SIZE}


def run_here(args: argparse.Namespace) -> None:
    """Run steps as one process of a group; the first process writes the figures."""
    torch.set_num_threads(max(args.threads // args.processes[0], 1))
    dist.init_process_group("gloo")
    config = small_config(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        heads=8,
        kv_heads=4,
        vocab_size=VOCAB_SIZE,
    )
    model = random_model(config, torch.float32).train()
    getattr(model, f"{checkpointing_option()}_enable")()
    use_onepass_attention(model)
    add_fused_lm_head(model)
    step(model, num_turns=1)  # loads libraries, starts threads, makes the gradients of the weights
    dist.barrier()
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before, begin = held_kib("VmRSS"), time.perf_counter()
    seq, loss = step(model, args.turns)
    figures = [(held_kib("VmHWM") - before) / 1024, time.perf_counter() - begin]
    most = torch.tensor(figures, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        peak, seconds = most.tolist()
        result = {"seq": seq, "peak_mib": peak, "seconds": seconds, "loss": loss}
        Path(args.here).write_text(json.dumps(result))
    dist.destroy_process_group()


def step(model: torch.nn.Module, num_turns: int) -> tuple[int, float]:
    """Run forward and backward on a chat; return the row's length and the loss."""
    row = linearize(build_tree(chat_passes(num_turns, **TURN)))
    batch = OnePassCollator()([row])
    inputs = model_inputs(batch)
    options = {"use_cache": False, "fused_lm_head": True}
    if dist.get_world_size() == 1:
        outputs = model(**inputs, **options)
    else:
        outputs = forward_in_pieces(model, dist.group.WORLD, inputs, **options)
    loss = -(outputs.log_probs * batch["weights"]).sum() / batch["weights"].sum()
    loss.backward()
    return len(row), loss.item()


def measure(num_processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a group of processes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={num_processes}"]
        flags = [f"--here={file}", f"--processes={num_processes}", f"--turns={args.turns}"]
        flags += [f"--layers={args.layers}", f"--hidden-size={args.hidden_size}"]
        flags += [f"--threads={args.threads}"]
        # glibc gives back what it has mapped, but keeps its heaps.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, __file__, *flags]
        subprocess.run(command, env=environment, check=True)
        return {"processes": num_processes, **json.loads(file.read_text())}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--turns", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--here", help="run in this process, write its figures to this file")
    args = parse(parser, arguments)
    if args.here:
        run_here(args)
        return
    results: list[dict[str, Any]] = []
    for num_processes in args.processes:
        result = measure(num_processes, args)
        result["memory_ratio"] = result["peak_mib"] / (results or [result])[0]["peak_mib"]
        results.append(result)
        print(
            f"{num_processes} processes, {result['seq']:,} tokens: {result['peak_mib']:,.0f} MiB "
            f"in each ({result['memory_ratio']:.2f}), {result['seconds']:.1f} s",
            flush=True,
        )
    if args.json:
        write(args.json, "context_parallel", results)


if __name__ == "__main__":
    main()
