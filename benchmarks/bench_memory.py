"""Peak memory of attention against the length of the row: one pass, dense mask, FlexAttention.

Each figure comes from a separate process: the peak memory of forward and backward, inputs and
gradients included, beyond what the process held before. Short rows are run first, so that libraries
are loaded, threads started and FlexAttention is compiled. On a CPU FlexAttention has no backward,
so its figures are for the forward pass only. Linux with glibc only.

    python benchmarks/bench_memory.py --json benchmarks/results/memory.json
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from command import make_parser, parse

from onepass_trl import build_tree, linearize
from onepass_trl.tools.bench.attention import check_memory, time_once
from onepass_trl.tools.bench.peers import DENSE_MASK, FLEX, make_inputs, make_peers
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.timing import reason
from onepass_trl.tools.bench.workload import AttentionShape, chat_passes

PEERS = ("onepass cpu", FLEX, DENSE_MASK)
TURN = {"user": 60, "reasoning": 260, "response": 150}
SHAPE = AttentionShape(heads=4, kv_heads=2, d_qk=64, d_v=64)
DEVICE = torch.device("cpu")
WARM_UP = (1, 2)  # at the second length FlexAttention learns that lengths vary, and compiles again


def held_kib(name: str) -> int:
    """Return a size of this process: VmRSS is its current memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])


def measure_here(name: str, turns: int) -> dict[str, Any]:
    """Return the figures of one peer and one row, in this process."""
    for short in WARM_UP:
        run(name, short)
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = held_kib("VmRSS")
    seq, has_backward, note = run(name, turns)
    peak = None if note else (held_kib("VmHWM") - before) / 1024
    return {"seq": seq, "backward": has_backward, "peak_mib": peak, "note": note}


def run(name: str, turns: int) -> tuple[int, bool, str | None]:
    """Run one peer; return the row's length, whether it has a backward, why it was refused."""
    row = linearize(build_tree(chat_passes(turns, **TURN, vocab_size=1000))).visible_end
    inputs = make_inputs(row, SHAPE, torch.float32, DEVICE)
    peer = make_peers(inputs)[name]
    try:
        check_memory(peer, DEVICE)
    except RuntimeError as error:
        return row.size, peer.has_backward, reason(error)
    time_once(peer, inputs)
    return row.size, peer.has_backward, None


def measure(name: str, turns: int, threads: int) -> dict[str, Any]:
    """Return the figures of one peer and one row, measured in a separate process."""
    process = subprocess.run(
        [
            sys.executable,
            __file__,
            "--here",
            name,
            "--turns",
            str(turns),
            "--threads",
            str(threads),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--here", choices=PEERS, help="measure this peer in this process")
    args = parse(parser, arguments)
    if args.here is not None:
        print(json.dumps(measure_here(args.here, args.turns[0])))
        return
    shape = {"heads": SHAPE.heads, "kv_heads": SHAPE.kv_heads, "head_dim": SHAPE.d_qk}
    results = []
    for turns in args.turns:
        for name in PEERS:
            figures = measure(name, turns, args.threads)
            results.append({"implementation": name, **shape, "turns": turns, **figures})
            peak = figures["note"] if figures["note"] else f"{figures['peak_mib']:,.0f} MiB"
            print(f"{figures['seq']:7,} tokens, {name}: {peak}", flush=True)
    if args.json:
        write(args.json, "memory", results)


if __name__ == "__main__":
    main()
