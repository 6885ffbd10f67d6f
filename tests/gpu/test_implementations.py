"""What `auto` takes where no kernel of ours is validated, torch's variable-length kernels and
FlexAttention, against the dense reference in float64.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass_trl.attention import tree_attention
from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.varlen import VARLEN
from onepass_trl.attention.self_check.comparison import deterministic_mode
from tests.attention.cases import Case, error
from tests.attention.flash import flash_attention_on_cpu

from .device import BF16, DRY_RUN, Kernel, case_on_device

HEADS = [(64, 64), (128, 128), (192, 128), (256, 256)]
ALL: dict[str, Any] = {"window": 100, "softcap": 2.0, "sinks": True}
OF_VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 30},
    "sinks": {"sinks": True},
    "both": {"window": 100, "sinks": True},
}
CASES = [
    pytest.param("varlen", dtype, heads, options, id=f"varlen-{dtype}-{heads}-{name}")
    for dtype in (BF16, torch.float16)
    for heads in HEADS
    for name, options in OF_VARLEN.items()
]
# FlexAttention compiles for every one of them: enough for each option and each head size.
CASES += [
    pytest.param("flex", BF16, heads, options, id=f"flex-{BF16}-{heads}-{name}")
    for heads, (name, options) in zip(
        HEADS, [("all", ALL), ("plain", {}), ("plain", {}), ("all", ALL)], strict=True
    )
]


def run(impl: str, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return out, lse and the gradients of out: lse has none in variable-length kernels."""
    differentiable = not (DRY_RUN and impl == "flex")  # which has no backward on a CPU
    leaves = {
        name: x.to(dtype, copy=True).requires_grad_(differentiable)
        for name, x in case.inputs.items()
    }
    if DRY_RUN and impl == "varlen":  # with kernels for the test
        given = {"sinks": None, **leaves, **case.options}
        call = Call(**given, visible_end=case.visible_end, scale=leaves["q"].shape[3] ** -0.5)
        out, lse = VARLEN.run(call)
    else:
        out, lse = tree_attention(
            **leaves, visible_end=case.visible_end, **case.options, impl=impl, return_lse=True
        )
    found = {"out": out, "lse": lse}
    if differentiable:
        gradients = torch.autograd.grad(out, list(leaves.values()), case.dout.to(out.dtype))
        found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found


@pytest.fixture
def kernels_on_cpu():
    with flash_attention_on_cpu() if DRY_RUN else nullcontext():
        yield


@pytest.mark.parametrize(("impl", "dtype", "heads", "options"), CASES)
def test_against_the_reference(kernels_on_cpu, impl, dtype, heads, options):
    case = case_on_device(Kernel(dtype, *heads).shape(2, 4, 2, 333), dtype, seed=1, **options)
    actual = run(impl, case, dtype)
    exact = run("dense", case, torch.float64)
    eager = run("dense", case, dtype)
    for name, x in actual.items():
        assert x.isfinite().all(), name
        limit = 2 * error(eager[name], exact[name]) + 4 * torch.finfo(dtype).eps
        assert error(x, exact[name]) <= limit, name


@pytest.mark.parametrize("window", [None, 200])
def test_variable_length_kernels_give_the_same_bits_where_asked_for(kernels_on_cpu, window):
    seq = 300 if DRY_RUN else 3000
    case = case_on_device(Kernel(BF16, 128, 128).shape(2, 8, 2, seq), window=window, sinks=True)
    with deterministic_mode():
        first = run("varlen", case, BF16)
        for _ in range(5):
            for name, x in run("varlen", case, BF16).items():
                assert torch.equal(x, first[name]), name
