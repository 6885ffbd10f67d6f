"""mamba-ssm, also without its compiled part: the kernels of Mamba 2 are Triton's. And inputs of its
scan on trees.

Import it before models of transformers, which look for the package when they are.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from onepass_trl.attention.branching import mamba2
from tests.attention.branching import recurrences
from tests.hybrids_fla.cases import Case, Rule, case_of

_COMPILED = "selective_scan_cuda"

# Its package needs that for the first Mamba alone. Tests that skip where mamba-ssm is missing
# leave no such module to others.
if (
    importlib.util.find_spec("mamba_ssm")
    and _COMPILED not in sys.modules
    and importlib.util.find_spec(_COMPILED) is None
):
    sys.modules[_COMPILED] = ModuleType(_COMPILED)

from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: E402


def scan(*, chunk_size: int, gated: bool, limit: tuple[float, float]) -> Rule:
    """Return the scan of mamba-ssm.

    Args:
        chunk_size: in tokens.
        gated: whether it gets z.
        limit: the least and the largest step.
    """

    def by(run: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *others: Any, **tree: Any) -> Any:
        *z, A, D, dt_bias = others
        options = dict(D=D, z=z[0] if z else None, dt_bias=dt_bias, dt_softplus=True)
        return run(x, dt, A, B, C, chunk_size, dt_limit=limit, seq_idx=None, **options, **tree)

    along_tree = mamba2.chunk_scan(mamba_chunk_scan_combined, "mamba2_chunk_scan")
    return Rule(
        sequences=("x", "dt", "B", "C", *["z"] * gated),
        parameters=("A", "D", "dt_bias"),
        along_tree=lambda *leaves, **tree: by(along_tree, *leaves, **tree),
        plain=lambda *leaves: by(mamba_chunk_scan_combined, *leaves),
        recurrence=lambda *x: recurrences.mamba2(*x, softplus=True, limit=limit),
    )


def make_case(
    visible_end: Tensor,
    *,
    heads: int = 2,
    groups: int = 1,
    head_dim: int = 8,
    state_size: int = 16,
    chunk_size: int = 16,
    gated: bool = False,
    limit: tuple[float, float] = (0.0, float("inf")),
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Return a case on the device of `visible_end`. Parameters are float32, as in models."""
    generator = torch.Generator().manual_seed(0)
    device, shape = visible_end.device, visible_end.shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    sizes = [(heads, head_dim), (heads,), (groups, state_size), (groups, state_size)]
    sequences = [normal(*shape, *size).to(dtype) for size in sizes + sizes[:1] * gated]
    parameters = [-normal(heads).exp(), normal(heads), normal(heads) - 2]
    dout = normal(*shape, heads, head_dim).to(dtype)
    rule = scan(chunk_size=chunk_size, gated=gated, limit=limit)
    return case_of(rule, visible_end, [*sequences, *parameters], dout)
