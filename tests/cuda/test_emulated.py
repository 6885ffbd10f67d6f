"""The CUDA kernels, run on the CPU emulator, against the dense reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention.cases import Case, Shape, assert_errs_little_more_than_eager, error, make_case
from tests.attention.rows import causal_row, chat_row, packed_row

from . import emulation

OPTIONS = {
    "plain": {},
    "window": {"window": 30},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 20, "sinks": True},
    "softcap and sinks": {"softcap": 2.0, "sinks": True},
    "all": {"window": 30, "softcap": 2.0, "sinks": True},
}
BF16 = torch.bfloat16


FAMILIES = pytest.mark.parametrize("family", ["sm80", "sm80 in order", "sm90", "sm90 in order"])


def check(case: Case, family: emulation.Family, dtype: torch.dtype = BF16) -> None:
    assert_errs_little_more_than_eager(case, emulation.run(case, dtype, family), dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@FAMILIES
def test_every_option(family, dtype, options):
    case = make_case(Shape(2, 4, 2, 150, 64, 64), dtype=dtype, seed=4, **options)
    check(case, family, dtype)


HEAD_DIMS = {
    "sm80": emulation.HEAD_DIMS,
    "sm90": emulation.cuda_build.HOPPER_HEAD_DIMS,
    **{f"{family} in order": dims for family, dims in emulation.FUSED_HEAD_DIMS.items()},
}


def every_head_size(*families: emulation.Family) -> pytest.MarkDecorator:
    pairs = [(family, pair) for family in families for pair in HEAD_DIMS[family]]
    return pytest.mark.parametrize(("family", "head_dims"), pairs, ids=str)


@every_head_size(*HEAD_DIMS)
def test_every_head_size(family, head_dims):
    case = make_case(Shape(1, 2, 1, 300, *head_dims), dtype=BF16, seed=5, window=90, sinks=True)
    check(case, family)


@pytest.mark.parametrize("seq", [1, 3, 63, 64, 65, 127, 128, 129, 257])
@FAMILIES
def test_rows_on_both_sides_of_the_tiles(family, seq):
    # The gradient of a lone score is a difference of about equals: many rows, so that it is not the
    # whole result.
    batch = 16 if seq < 4 else 1
    check(make_case(Shape(batch, 2, 1, seq, 64, 64), dtype=BF16, seed=seq, sinks=True), family)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq"), [(3, 3, 70), (6, 2, 70), (4, 1, 70), (6, 2, 600), (8, 1, 600)]
)
@FAMILIES
def test_groups_of_heads_as_a_whole_and_in_parts(family, heads, kv_heads, seq):
    batch = 2 if seq < 100 else 1
    check(make_case(Shape(batch, heads, kv_heads, seq, 64, 64), dtype=BF16, seed=6), family)


ROWS = {
    "causal": causal_row(260),
    "chat": chat_row(4, 5, 40),
    "chat of short messages": chat_row(12, 1, 9),
    "packed": packed_row(300, 3, 30),
    "packed, split": packed_row(300, 8, 30, seed=3),
    "one-token documents": torch.arange(1, 101, dtype=torch.int32)[None],
}


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@FAMILIES
def test_rows_of_the_package(family, row, window):
    shape = Shape(1, 2, 1, row.shape[1], 64, 64)
    check(make_case(shape, dtype=BF16, seed=7, visible_end=row, window=window), family)


@FAMILIES
def test_documents_that_meet_within_a_pair_of_tiles(family):
    """With a window, tiles of 128 queries cannot be told apart as those of 64 can: here the first
    half of one is too far from early keys, and the second half is of another document.
    """
    visible_end = torch.tensor([448] * 448 + [648] * 200, dtype=torch.int32)[None]
    shape = Shape(1, 2, 1, 648, 64, 64)
    check(make_case(shape, dtype=BF16, seed=3, visible_end=visible_end, window=40), family)


@FAMILIES
def test_tiles_far_apart(family):
    """Kernels look for tiles 32 at a time: here those of some are further from each other, and the
    first of some further from the row's begin.
    """
    root, trunk_end = 100, 4300 if family.startswith("sm80") else 8500
    seq = trunk_end + 200
    visible_end = torch.full((1, seq), seq, dtype=torch.int32)  # a trunk of the root, and a branch
    visible_end[:, root:trunk_end] = trunk_end
    shape = Shape(1, 1, 1, seq, 64, 64)
    case = make_case(shape, dtype=BF16, seed=12, visible_end=visible_end, window=40)
    expected = case.run("cpu")
    for name, x in emulation.run(case, BF16, family).items():
        assert error(x, expected[name]) < 0.02, name


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def slice_of_a_wide_projection(x: Tensor) -> Tensor:
    """Return x as a model's fused projection gives it, between columns that are none of its."""
    batch, heads, seq, width = x.shape
    wide = torch.full((batch, seq, 3 * heads * width), torch.nan, dtype=x.dtype)
    middle = wide[..., heads * width : 2 * heads * width]
    return middle.view(batch, seq, heads, width).transpose(1, 2).copy_(x)


def batch_within_tokens(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


@pytest.mark.parametrize("lay_out", [contiguous, slice_of_a_wide_projection, batch_within_tokens])
@FAMILIES
def test_any_strides_give_the_same_bits(family, lay_out):
    case = make_case(Shape(2, 4, 2, 90, 64, 64), dtype=BF16, seed=8)
    expected = emulation.run(case, BF16, family)
    actual = emulation.run(case, BF16, family, lay_out=lay_out)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@every_head_size(*HEAD_DIMS)
def test_any_order_of_warps_and_blocks_gives_the_same_bits(family, head_dims):
    shape = Shape(1, 4, 2, 300, *head_dims)
    case = make_case(shape, dtype=BF16, seed=9, window=100, softcap=3.0, sinks=True)
    any_order = head_dims in emulation.FUSED_HEAD_DIMS.get(family, ())
    results = []
    for seed in range(4):
        emulation.set_seed(seed)
        results.append(emulation.run(case, BF16, family))
    for result in results[1:]:
        for name, x in results[0].items():
            if any_order and name == "dq":
                assert error(result[name], x) <= torch.finfo(BF16).eps
            else:
                assert torch.equal(result[name], x), name


@pytest.mark.parametrize(
    "row", [causal_row(700), packed_row(700, 8, 60, seed=3)], ids=["causal", "packed"]
)
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_bits_of_dq_depend_on_the_order_in_which_blocks_add_unless_it_is_requested(family, row):
    case = make_case(Shape(1, 4, 2, row.shape[1], 64, 64), dtype=BF16, seed=9, visible_end=row)
    for way, same in ((family, False), (f"{family} in order", True)):
        results = []
        for seed in range(3):
            emulation.set_seed(seed)
            results.append(emulation.run(case, BF16, way, with_sums=True)["dq_sums"])
        assert all(torch.equal(result, results[0]) for result in results) == same


@every_head_size("sm80", "sm90")
def test_products_of_a_backward_pass(family, head_dims):
    """S, dP, dq, dv and dk at once; or S and dP for dq, S for dv, and S and dP for dk."""
    d_qk, d_v = head_dims
    seq = 64 if family == "sm80" else 128  # one tile of every kernel
    case = make_case(Shape(1, 1, 1, seq, *head_dims), dtype=BF16, visible_end=causal_row(seq))
    counts = []
    for run in (emulation.run_forward, emulation.run):
        emulation.counters()
        run(case, BF16, family)
        counts.append(emulation.counters().products)
    fused = head_dims in emulation.FUSED_HEAD_DIMS[family]
    deep, wide = (3, 2) if fused else (5, 3)  # products of d_qk and of d_v columns
    assert counts[1] - counts[0] == seq * seq * (deep * d_qk + wide * d_v) // (16 * 8 * 16)


@FAMILIES
def test_without_a_gradient_of_lse(family):
    case = make_case(Shape(1, 2, 1, 100, 64, 64), dtype=BF16, seed=10, sinks=True)
    case.dlse.zero_()
    result = emulation.run(case, BF16, family, through_lse=False)
    assert_errs_little_more_than_eager(case, result, BF16)


@FAMILIES
def test_large_scores_do_not_overflow(family):
    case = make_case(Shape(1, 2, 1, 100, 64, 64), dtype=BF16, seed=11)
    case.inputs["q"] *= 1024
    case.inputs["k"] *= 128
    result = emulation.run(case, BF16, family)
    assert all(x.isfinite().all() for x in result.values())
    assert error(result["out"], case.run("dense")["out"]) < 0.05


@every_head_size("sm80")
def test_matrix_loads_have_no_bank_conflict(family, head_dims):
    emulation.counters()
    emulation.run(make_case(Shape(1, 1, 1, 70, *head_dims), dtype=BF16), BF16, family)
    counters = emulation.counters()
    assert counters.matrix_loads > 0
    assert counters.bank_conflicts == 0
