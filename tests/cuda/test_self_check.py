"""The check that kernels pass at their first use: by the CUDA kernels, on the CPU emulator."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.self_check.cases import hostile_cases
from onepass_trl.attention.self_check.comparison import Run, mistake_in

from . import emulation


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, call: Call, family: emulation.Family):
        options = dict(
            scale=call.scale,
            positions=call.positions,
            window=call.window or 0,
            softcap=call.softcap or 0.0,
            sinks=sinks,
            family=family,
        )
        q, k, v = map(emulation.guarded_copy, (q, k, v))
        out, lse, plan = emulation.forward(q, k, v, call.visible_end, **options)
        ctx.save_for_backward(q, k, v, out, lse, call.visible_end, plan)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None):
        gradients = emulation.backward(
            emulation.guarded_copy(dout),
            None if dlse is None else dlse.contiguous(),
            *ctx.saved_tensors,
            **ctx.options,
        )
        return *gradients[:4], None, None


def emulated(family: str) -> Run:
    """Return attention by the kernels of a family, with dq added up in any order or in one."""

    def run(call: Call) -> tuple[Tensor, Tensor]:
        in_order = " in order" if torch.are_deterministic_algorithms_enabled() else ""
        return _Emulated.apply(call.q, call.k, call.v, call.sinks, call, family + in_order)

    return run


@pytest.mark.long("csrc", "tests/cuda", "onepass_trl/attention/self_check")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_nothing_is_wrong_with_the_kernels(family, dtype):
    """With all options at once: a case takes the emulator seconds."""
    for case in islice(hostile_cases(dtype, (64, 64)), 2, None, 3):
        case = case._replace(copies=1)
        assert mistake_in(case, emulated(family), torch.device("cpu"), dtype) is None
