"""What a layer of linear attention launches with flash-linear-attention, forward and backward.

On a GPU such a layer is bound by launches and by chunks that wait for one another, so this counts
them and times nothing, for chats of several lengths, in the ways of `linear_ways.py`. Kernels are
counted and not run, so no GPU is needed. `launches` are those of Triton's kernels, `torch_kernels`
what PyTorch launches besides: operations that compute something or copy. `steps` are the chunks
that follow one another in the kernels that carry the state forward.

    make .venv-fla
    export TRITON_INTERPRET=1 PYTHONPATH=.
    .venv-fla/bin/python benchmarks/count_launches.py --json benchmarks/results/launches.json
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest.mock import patch

import torch
from linear_ways import Shape, Way, chat, ways
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import autotuner, interpreter

from onepass_trl.tools.bench.results import write

SMALL = Shape(heads=1, value_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
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


def count(way: Way) -> dict[str, int]:
    """Return what a second step launches; the first makes what is kept of the tree."""
    launches = 0

    def note(*_: Any, **__: Any) -> None:
        nonlocal launches
        launches += 1

    untimed = patch.object(autotuner.Autotuner, "_bench", lambda *_, **__: [0.0, 0.0, 0.0])
    with untimed, patch.object(interpreter.InterpretedFunction, "run", note):
        way.step()
        launches = 0
        with _Operations() as operations:
            way.step()
    return {"launches": launches, "torch_kernels": operations.count}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args(arguments)
    results = []
    for turns in args.turns:
        of_chat = ways(chat(turns), SMALL)
        counted = {name: count(way) | {"steps": way.steps} for name, way in of_chat.items()}
        result: dict[str, Any] = {"turns": turns}
        result["one_pass_tokens"] = of_chat["leveled"].num_tokens
        result["n_pass_tokens"] = of_chat["n_pass"].num_tokens
        for figure in ("launches", "torch_kernels", "steps"):
            result |= {f"{figure}_{name}": counted[name][figure] for name in counted}
        results.append(result)
        print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    if args.json:
        write(args.json, "launches", results)


if __name__ == "__main__":
    main()
