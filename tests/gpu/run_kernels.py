"""Runs the kernels under a tool of CUDA, such as compute-sanitizer or ncu.

compute-sanitizer --tool memcheck python -m tests.gpu.run_kernels small
ncu --set full -k 'regex:forward_kernel|dq_dk_dv_kernel' python -m tests.gpu.run_kernels large
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from onepass_trl.attention import tree_attention
from onepass_trl.attention.self_check.comparison import deterministic_mode
from tests.attention.rows import chat_row

from .device import BF16, DEVICE, DRY_RUN, IMPL, built_kernels, case_on_device


def small() -> None:
    """Run short rows, both ways of dq, with everything that changes scores."""
    kernel = built_kernels()[0]
    for seq in (1, 65, 200):
        case = case_on_device(
            kernel.shape(2, 2, 1, seq), kernel.dtype, window=50, softcap=2.0, sinks=True
        )
        for same_bits in (False, True):
            with deterministic_mode(same_bits):
                case.run(IMPL, kernel.dtype)


def large() -> None:
    """Run forward and backward on a chat of 9,000 tokens in the shape of an 8B model."""
    visible_end = chat_row(10, 8, 30) if DRY_RUN else chat_row(10, 200, 400)
    heads, kv_heads, d = (2, 1, 64) if DRY_RUN else (32, 8, 128)
    q, k, v, dout = (
        torch.randn(1, visible_end.shape[1], n, d, device=DEVICE, dtype=BF16).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tree_attention(*leaves, visible_end.to(DEVICE), impl=IMPL)
    torch.autograd.grad(out, leaves, dout)


RUNS: dict[str, Callable[[], None]] = {"small": small, "large": large}

if __name__ == "__main__":
    RUNS[sys.argv[1]]()
    if not DRY_RUN:
        torch.cuda.synchronize()
    print("ran")
