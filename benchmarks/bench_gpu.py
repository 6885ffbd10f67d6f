"""Times tree attention and whole training steps on a GPU, against their alternatives.

    make bench-gpu
    python benchmarks/bench_gpu.py --only attention --seqs 16384
    python benchmarks/bench_gpu.py --only attention --cases chats
    python benchmarks/bench_gpu.py --only steps --models 0.6B

Needs torch with CUDA, transformers and the built library, but no network. Writes
results/<device>_<date>_<commit>_<part>.json and prints a table at the end. `--device cpu --tiny`
tries the benchmark out; its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # an offline machine may have only the repository

import gpu_attention  # noqa: E402
import gpu_steps  # noqa: E402
import torch  # noqa: E402

from onepass_trl.tools.bench.results import commit, write  # noqa: E402

PARTS: dict[str, Any] = {"attention": gpu_attention, "steps": gpu_steps}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one of the two parts")
    parser.add_argument("--seqs", type=int, nargs="+", help="attention: only rows of these lengths")
    parser.add_argument("--cases", help="attention: only cases with this in their name")
    parser.add_argument("--models", nargs="+", choices=gpu_steps.MODELS, default=["0.6B", "8B"])
    parser.add_argument("--repeats", type=int, default=20, help="of attention, after warm-up")
    parser.add_argument("--step-repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of each peer and case")
    parser.add_argument("--step-tokens", type=int, default=16_384, help="tokens of a one-pass row")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs=2, default=[64, 512], metavar=("LOW", "HIGH"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: --device cpu --tiny only tries the benchmark out")
    if args.tiny:
        args.repeats = args.step_repeats = 1
        args.step_tokens, args.turns, args.lengths = 100, 3, [2, 9]
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    device = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    done: dict[str, list[dict[str, Any]]] = {}
    args.results.mkdir(parents=True, exist_ok=True)
    for part, module in PARTS.items():
        if args.only in (None, part):
            done[part] = []
            path = args.results / f"{device}_{date}_{commit()}_{part}.json"
            for rows in module.measure(args):
                done[part] += rows
                write(path, f"gpu_{part}", done[part])  # after each part: a run may be cut short
            if not done[part]:
                raise SystemExit(f"{part}: --seqs and --cases leave nothing to measure")
            print(f"wrote {path}", flush=True)
    for part, results in done.items():
        PARTS[part].print_table(results)


if __name__ == "__main__":
    main()
