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
import faulthandler
import json
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
    parser.add_argument(
        "--peers", nargs="+", help='attention: only these, such as "onepass cuda" (default: all)'
    )
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
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="write what has been measured to FILE too, and go on from what it has: whatever ended "
        "a process, such as a fault of a kernel, is left out",
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="end the process if one case takes longer"
    )
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
    args.results.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[dict[str, Any]]] = {}
    died: list[str] = []
    for part in PARTS if args.only is None else [args.only]:
        path = args.results / f"{device}_{date}_{commit()}_{part}.json"
        done[part] = measure(part, args, path, died)
        print(f"wrote {path}", flush=True)
    for part, results in done.items():
        PARTS[part].print_table(results)
    if died:
        raise SystemExit(f"ended the process that measured them: {'; '.join(died)}")


def measure(
    part: str, args: argparse.Namespace, path: Path, died: list[str]
) -> list[dict[str, Any]]:
    """Return the results of a part. They are written to `path` after each case: a run may end.

    The names of cases that have ended a process before go to `died`.
    """
    measured: dict[str, list[dict[str, Any]] | None] = {}  # None: begun
    if args.resume is not None and args.resume.exists():
        measured = json.loads(args.resume.read_text())
    results: list[dict[str, Any]] = []
    for name, run in PARTS[part].measurements(args):
        if name not in measured:
            measured[name] = None
            _remember(measured, args)
            if args.limit is not None:
                faulthandler.dump_traceback_later(args.limit, exit=True)
            measured[name] = run()
            faulthandler.cancel_dump_traceback_later()
            _remember(measured, args)
        rows = measured[name]
        if rows is None:
            died.append(name)
            continue
        results += rows
        write(path, f"gpu_{part}", results)
    if not measured:
        raise SystemExit(f"{part}: --seqs and --cases leave nothing to measure")
    return results


def _remember(measured: dict[str, list[dict[str, Any]] | None], args: argparse.Namespace) -> None:
    if args.resume is not None:
        args.resume.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
