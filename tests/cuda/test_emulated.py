"""The CUDA kernels, run on the CPU emulator, against the dense reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention.cases import Case, Shape, error, make_case

from . import emulation

OPTIONS = {
    "plain": {},
    "window": {"window": 30},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 30, "softcap": 2.0, "sinks": True},
}


def run_emulated(case: Case, dtype: torch.dtype, family: str) -> dict[str, Tensor]:
    """Return what `Case.run` returns, by the CUDA kernels of a family."""
    q, k, v = (_guarded_copy(case.inputs[name].to(dtype)) for name in "qkv")
    sinks = case.inputs["sinks"].float() if "sinks" in case.inputs else None
    window = case.options["window"] or 0
    options = {
        "scale": q.shape[3] ** -0.5,
        "positions": case.options["positions"] if window else None,
        "window": window,
        "softcap": case.options["softcap"] or 0.0,
        "sinks": sinks,
        "family": family,
    }
    out, lse, plan = emulation.forward(q, k, v, case.visible_end, **options)
    dout = _guarded_copy(case.dout.to(dtype))
    dlse = case.dlse.float()
    dq, dk, dv, dsinks = emulation.backward(
        dout, dlse, q, k, v, out, lse, case.visible_end, plan, **options
    )
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return results if dsinks is None else {**results, "dsinks": dsinks}


def _guarded_copy(x: Tensor) -> Tensor:
    return emulation.guarded(x, x.shape[3]).copy_(x)


def assert_errs_little_more_than_the_eager_reference(
    case: Case, dtype: torch.dtype, family: str
) -> None:
    exact, eager = case.run("dense"), case.run("dense", dtype)
    for name, actual in run_emulated(case, dtype, family).items():
        # P and dS are rounded to the dtype before their products, as in every fused kernel; the
        # eager reference keeps them in float32.
        limit = 2 * error(eager[name], exact[name]) + 4 * torch.finfo(dtype).eps
        assert error(actual, exact[name]) <= limit, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_every_option(family, dtype, options):
    case = make_case(Shape(2, 4, 2, 150, 64, 64), dtype=dtype, seed=4, **options)
    assert_errs_little_more_than_the_eager_reference(case, dtype, family)


@pytest.mark.parametrize("head_dims", emulation.HEAD_DIMS, ids=str)
def test_every_head_size(head_dims):
    case = make_case(Shape(1, 2, 1, 200, *head_dims), dtype=torch.bfloat16, seed=5)
    assert_errs_little_more_than_the_eager_reference(case, torch.bfloat16, "sm80")


def test_every_head_size_of_the_hopper_kernels():
    case = make_case(Shape(1, 2, 1, 300, 128, 128), dtype=torch.bfloat16, seed=5)
    assert_errs_little_more_than_the_eager_reference(case, torch.bfloat16, "sm90")
