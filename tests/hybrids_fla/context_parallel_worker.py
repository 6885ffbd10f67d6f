"""Compares a batch whose rows two processes share with the whole batch; started for each of them by
test_context_parallel.py.

python -m tests.hybrids_fla.context_parallel_worker FILE RANK
"""

from __future__ import annotations

import sys

import tests.hybrids_fla.interpreter  # noqa: F401 isort: skip (before kernels are imported)

import torch
import torch.distributed as dist

from onepass_trl.attention.branching import fla_rule
from onepass_trl.attention.head_exchange import ContextParallel
from tests.attention.rows import chat_row
from tests.hybrids_fla import mamba
from tests.hybrids_fla.cases import GATED, KIMI, Case, make_case
from tests.hybrids_fla.test_rules import TOLERANCE

SIZE = 2


def main(file: str, rank: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(file, SIZE)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=SIZE)
    fla_rule.CHUNK_SIZE = 32
    row = chat_row(2, 3, 9)
    row = row[:, : row.shape[1] // SIZE * SIZE].clamp(max=row.shape[1] // SIZE * SIZE)
    cases = {
        "gated delta rule": make_case(GATED, row, heads=2),
        "Kimi delta rule": make_case(KIMI, row, heads=2),
        "Mamba 2": mamba.make_case(row, heads=4, groups=2),
    }
    for name, case in cases.items():
        for result, error in errors(case, dist.group.WORLD).items():
            assert error < TOLERANCE, (name, result, error)
    dist.destroy_process_group()


def errors(case: Case, group: dist.ProcessGroup) -> dict[str, float]:
    """Return those of this process's pieces, and of the summed gradients of parameters."""
    rank, num_sequences = dist.get_rank(), len(case.rule.sequences)

    def own(x: torch.Tensor) -> torch.Tensor:
        return x.detach().chunk(SIZE, dim=1)[rank]

    sequences = [own(x).clone().requires_grad_() for x in case.leaves[:num_sequences]]
    leaves = [*sequences, *case.leaves[num_sequences:]]
    positions = torch.arange(case.visible_end.shape[1])[None]
    out = case.out(*leaves, context_parallel=ContextParallel(group, positions))
    gradients = list(torch.autograd.grad(out, leaves, own(case.dout)))
    for gradient in gradients[num_sequences:]:
        dist.all_reduce(gradient)
    expected = [own(x) for x in case.expected[: 1 + num_sequences]]
    expected += case.expected[1 + num_sequences :]
    return case._replace(leaves=leaves, expected=expected).errors(out, gradients)


if __name__ == "__main__":
    main(*sys.argv[1:])
