"""The check that kernels pass at their first use, on the device, also of planted mistakes."""

from __future__ import annotations

import pytest
import torch

from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.cpu import CPU
from onepass_trl.attention.implementations.cuda import CUDA
from onepass_trl.attention.self_check.cases import hostile_cases
from onepass_trl.attention.self_check.comparison import mistake_in
from onepass_trl.attention.self_check.process import check_in_process
from onepass_trl.attention.self_check.verdicts import Verdict

from .device import BF16, DRY_RUN, Kernel, built_kernels, every_kernel

RIGHT = CPU if DRY_RUN else CUDA


def device() -> torch.device:
    return torch.device("cpu") if DRY_RUN else torch.device("cuda", torch.cuda.current_device())


@every_kernel
def test_kernels_pass(kernel: Kernel):
    verdict = check_in_process(device(), kernel.dtype, (kernel.d_qk, kernel.d_v))
    assert verdict == Verdict("passed")


def without_dq_of_a_tile(call: Call):
    def change(dq: torch.Tensor) -> torch.Tensor:
        dq = dq.clone()
        dq[:, :, 64:128] = 0
        return dq

    q = call.q.view_as(call.q)
    q.register_hook(change)
    return RIGHT.run(call._replace(q=q))


MISTAKES = {
    "no window": lambda call: RIGHT.run(call._replace(window=None)),
    "causal": lambda call: RIGHT.run(
        call._replace(visible_end=torch.full_like(call.visible_end, call.q.shape[2]))
    ),
    "dq of a tile": without_dq_of_a_tile,
}


@pytest.mark.parametrize("wrong", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found(wrong):
    kernel = built_kernels()[0]
    cases = hostile_cases(BF16, (kernel.d_qk, kernel.d_v))
    assert any(mistake_in(case, wrong, device(), BF16) for case in cases)
