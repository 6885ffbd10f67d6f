"""Every kernel against the dense reference in float64, where it can be held in memory, and against
chosen queries of it where it cannot.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onepass_trl.attention import tree_attention
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.attention.self_check.comparison import deterministic_mode
from tests.attention.cases import Case, assert_errs_little_more_than_eager, error
from tests.attention.rows import causal_row, chat_row, packed_row

from .device import DEVICE, DRY_RUN, IMPL, Kernel, case_on_device, every_kernel, poison_memory

OPTIONS = {
    "plain": {},
    "window": {"window": 30},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 2.0, "sinks": True},
}
ROWS = {
    "causal": causal_row(900),
    "chat": chat_row(10, 5, 30 if DRY_RUN else 90),
    "chat of short messages": chat_row(30, 1, 12),
    "packed": packed_row(1000, 5, 60),
}


def check(case: Case, dtype: torch.dtype) -> None:
    for same_bits in (False, True):
        poison_memory()
        with deterministic_mode(same_bits):
            result = case.run(IMPL, dtype)
        assert_errs_little_more_than_eager(case, result, dtype)


@every_kernel
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(kernel: Kernel, options):
    check(case_on_device(kernel.shape(2, 4, 2, 333), kernel.dtype, seed=1, **options), kernel.dtype)


@every_kernel
@pytest.mark.parametrize("seq", [1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 191, 193, 257])
def test_rows_on_both_sides_of_the_tiles(kernel: Kernel, seq):
    # Many short rows: the gradient of a lone score is a difference of about equals.
    shape = kernel.shape(16 if seq < 8 else 2, 2, 1, seq)
    check(case_on_device(shape, kernel.dtype, seed=seq, sinks=True), kernel.dtype)


@every_kernel
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("window", [None, 50])
def test_rows_of_the_package(kernel: Kernel, row, window):
    shape = kernel.shape(1, 2, 1, row.shape[1])
    case = case_on_device(shape, kernel.dtype, seed=2, visible_end=row, window=window)
    check(case, kernel.dtype)


@every_kernel
@pytest.mark.parametrize("seed", range(4))
def test_random_trees(kernel: Kernel, seed):
    shape = kernel.shape(2, 4, 2, 700 if DRY_RUN else 1500 + 37 * seed)
    check(case_on_device(shape, kernel.dtype, seed=seed + 3), kernel.dtype)


@every_kernel
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (8, 1)])
def test_groups_of_heads(kernel: Kernel, heads, kv_heads):
    shape = kernel.shape(2, heads, kv_heads, 200)
    check(case_on_device(shape, kernel.dtype, seed=8, sinks=True), kernel.dtype)


def fused_projection(x: Tensor) -> Tensor:
    wide = x.transpose(1, 2).repeat(1, 1, 1, 3)
    return wide[..., x.shape[3] : 2 * x.shape[3]].transpose(1, 2)


def misaligned_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]


def columns_apart(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@every_kernel
@pytest.mark.parametrize("lay_out", [fused_projection, misaligned_rows, columns_apart])
def test_any_strides_give_the_same_bits(kernel: Kernel, lay_out):
    case = case_on_device(kernel.shape(2, 4, 2, 150), kernel.dtype, seed=9)
    q, k, v, dout = (x.to(kernel.dtype) for x in (*case.inputs.values(), case.dout))
    results = []
    for change in (Tensor.contiguous, lay_out):
        leaves = [change(x).detach().requires_grad_() for x in (q, k, v)]
        with deterministic_mode():
            out = tree_attention(*leaves, case.visible_end, impl=IMPL)
            results.append([out, *torch.autograd.grad(out, leaves, change(dout))])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@every_kernel
@pytest.mark.parametrize("same_bits", [False, True])
def test_the_same_bits_every_time(kernel: Kernel, same_bits):
    """Also under load, so that a race has its chance to show. dq only if that is asked for."""
    shape = kernel.shape(2, 8, 2, 300 if DRY_RUN else 3000)
    case = case_on_device(shape, kernel.dtype, seed=10, window=200, softcap=5.0, sinks=True)
    with deterministic_mode(same_bits):
        first = case.run(IMPL, kernel.dtype)
        for _ in range(2 if DRY_RUN else 10):
            poison_memory()
            again = case.run(IMPL, kernel.dtype)
            assert error(again["dq"], first["dq"]) <= 4 * torch.finfo(kernel.dtype).eps
            for name in first if same_bits else first.keys() - {"dq"}:
                assert torch.equal(again[name], first[name])


@every_kernel
@pytest.mark.parametrize("same_bits", [False, True])
def test_131072_tokens(kernel: Kernel, same_bits):
    """The exact results of 256 queries, and the gradients if those alone have one."""
    seq, heads, chosen = (4096, 2, 32) if DRY_RUN else (131_072, 4, 256)
    generator = torch.Generator(DEVICE).manual_seed(11)
    length, branch = seq // 8, seq // 32  # eight chats: a trunk, and branches of which none sees
    index = torch.arange(seq, device=DEVICE)  # another
    trunk_end, branch_end = (index // length + 1) * length, (index // branch + 1) * branch
    in_trunk = index % length < length // 2
    visible_end = torch.where(in_trunk, trunk_end, branch_end).int()[None]
    queries = torch.randperm(seq, generator=generator, device=DEVICE)[:chosen].sort().values

    def normal(num_heads: int, width: int) -> Tensor:
        size = (1, seq, num_heads, width)
        x = torch.randn(size, generator=generator, device=DEVICE, dtype=kernel.dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = normal(heads, kernel.d_qk), normal(1, kernel.d_qk), normal(1, kernel.d_v)
    dout = torch.zeros(1, heads, seq, kernel.d_v, device=DEVICE, dtype=kernel.dtype)
    dout[:, :, queries] = normal(heads, kernel.d_v).detach()[:, :, queries]
    poison_memory()
    with deterministic_mode(same_bits):
        out, lse = tree_attention(q, k, v, visible_end, impl=IMPL, return_lse=True)
        actual = [out[:, :, queries], *torch.autograd.grad(out, (q, k, v), dout)]

    seen = (index <= queries[:, None]) & (queries[:, None] < visible_end[0])

    def attend(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        scores = leaves[0][:, :, queries] @ leaves[1].transpose(2, 3) * kernel.d_qk**-0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        result = torch.softmax(scores.to(torch.promote_types(dtype, torch.float32)), -1)
        result = result.to(dtype) @ leaves[2]
        gradients = torch.autograd.grad(result, leaves, dout[:, :, queries].to(dtype))
        return torch.logsumexp(scores, -1), [result, *gradients]

    exact_lse, exact = attend(torch.float64)
    eager = attend(kernel.dtype)[1]
    assert error(lse[:, :, queries], exact_lse) < 1e-5
    for x, own, reference in zip(actual, eager, exact, strict=True):
        limit = 2 * error(own, reference) + 4 * torch.finfo(kernel.dtype).eps
        assert x.isfinite().all()
        assert error(x, reference) <= limit


@every_kernel
def test_what_no_query_sees_gets_no_gradient(kernel: Kernel):
    case = case_on_device(kernel.shape(1, 2, 1, 200), kernel.dtype, seed=12)
    leaves = [x.to(kernel.dtype).requires_grad_() for x in case.inputs.values()]
    out = tree_attention(*leaves, case.visible_end, impl=IMPL)
    query = 150
    gradients = torch.autograd.grad(out[:, :, query].float().sum(), leaves)
    seen = visibility_mask(case.visible_end)[0, query]
    assert (gradients[0][:, :, :query] == 0).all()
    for gradient in gradients[1:]:
        assert (gradient[:, :, ~seen] == 0).all()
