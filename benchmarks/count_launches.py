"""What a layer of linear attention launches with flash-linear-attention, forward and backward.

On a GPU such a layer is bound by launches and by chunks that wait for one another, so this counts
them and times nothing. One chat of each number of turns is

- grouped: cut into segments, fla called for each group of equal depth and length
- leveled: cut into segments, fla called once (`attention/branching/levels.py`)
- n_pass: one call for all passes, packed one after another

Kernels are counted and not run, so no GPU is needed. `launches` are those of Triton's kernels,
`torch_kernels` what PyTorch launches besides: operations that compute something or copy. `steps`
are the chunks that follow one another in the kernels that carry the state forward.

    make .venv-fla
    export TRITON_INTERPRET=1 PYTHONPATH=.
    .venv-fla/bin/python benchmarks/count_launches.py --json benchmarks/results/launches.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import autotuner, interpreter

from onepass_trl.attention.branching import delta_rule, fla_rule
from onepass_trl.attention.branching.levels import levels_of
from onepass_trl.attention.branching.recurrences import Groups
from onepass_trl.attention.branching.segments import segments_of
from onepass_trl.data import build_tree, linearize
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.workload import chat_passes

NAME = "torch_chunk_gated_delta_rule"
HEADS, VALUE_HEADS, HEAD_DIM = 1, 2, 16  # launches don't depend on them
CHUNK = fla_rule.CHUNK_SIZE
# What allocates or names memory and launches nothing.
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach"}


class _Operations(TorchDispatchMode):
    """Counts operations that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += not func.is_view and name.lstrip("_") not in _FREE | {"unsafe_view"}
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Tensor]) -> dict[str, int]:
    """Return what a second run launches, forward and backward; the first makes what is kept."""
    launches = 0

    def note(*_: Any, **__: Any) -> None:
        nonlocal launches
        launches += 1

    untimed = patch.object(autotuner.Autotuner, "_bench", lambda *_, **__: [0.0, 0.0, 0.0])
    with untimed, patch.object(interpreter.InterpretedFunction, "run", note):
        run().backward()
        launches = 0
        with _Operations() as operations:
            run().backward()
    return {"launches": launches, "torch_kernels": operations.count}


def inputs(num_tokens: int) -> list[Tensor]:
    sizes = [(HEADS, HEAD_DIM), (HEADS, HEAD_DIM), (VALUE_HEADS, HEAD_DIM)]
    sizes += [(VALUE_HEADS,), (VALUE_HEADS,)]
    return [torch.zeros(1, num_tokens, *size, requires_grad=True) for size in sizes]


def grouped_and_leveled(visible_end: Tensor) -> dict[str, dict[str, int]]:
    leaves = inputs(visible_end.shape[1])

    def run(rule: Callable[..., Any]) -> Tensor:
        return rule(*leaves, visible_end=visible_end, use_qk_l2norm_in_kernel=True)[0].sum()

    leveled = delta_rule.delta_rule(chunk_gated_delta_rule, NAME)
    with patch.object(delta_rule, "usable_backend", lambda: None):
        grouped = delta_rule.delta_rule(chunk_gated_delta_rule, NAME)
    groups = Groups(segments_of(visible_end), visible_end.device).groups
    steps = sum(-(-group.length // CHUNK) for group in groups)
    return {
        "grouped": count(lambda: run(grouped)) | {"steps": steps},
        "leveled": count(lambda: run(leveled)) | {"steps": levels_of(visible_end, CHUNK).num_steps},
    }


def n_pass(lengths: list[int]) -> dict[str, int]:
    leaves = inputs(sum(lengths))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])

    def run() -> Tensor:
        options = dict(use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
        return chunk_gated_delta_rule(*leaves, **options)[0].sum()

    return count(run) | {"steps": -(-max(lengths) // CHUNK)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args(arguments)
    results = []
    for turns in args.turns:
        rng = np.random.default_rng(0)
        passes = chat_passes(turns, (30, 100), (170, 800), (30, 100), 4096, rng)
        visible_end = torch.from_numpy(linearize(build_tree(passes)).visible_end)[None]
        counted = grouped_and_leveled(visible_end)
        counted["n_pass"] = n_pass([len(pass_) for pass_ in passes])
        result: dict[str, Any] = {"turns": turns}
        result["one_pass_tokens"] = visible_end.shape[1]
        result["n_pass_tokens"] = sum(len(pass_) for pass_ in passes)
        for figure in ("launches", "torch_kernels", "steps"):
            for way in ("grouped", "leveled", "n_pass"):
                result[f"{figure}_{way}"] = counted[way][figure]
        results.append(result)
        print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    if args.json:
        write(args.json, "launches", results)


if __name__ == "__main__":
    main()
