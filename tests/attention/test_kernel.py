"""The compiled CPU kernels against the dense reference and against separate sequences."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from onepass_trl.attention import tree_attention
from onepass_trl.attention.reference import visibility_mask

from .cases import Case, Shape, error, make_case
from .strategies import cases

OPTIONS = {
    "plain": {},
    "window": {"window": 30},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "blocks": {"blocks": True},
    "all": {"window": 30, "softcap": 2.0, "sinks": True, "blocks": True},
}
LARGE = Shape(batch=2, heads=6, kv_heads=2, seq=333, d_qk=48, d_v=24)


def assert_equals_reference(case: Case) -> None:
    expected = case.run("dense")
    for name, actual in case.run("cpu").items():
        limit = 1e-12 if name in ("out", "lse") else 1e-10
        assert error(actual, expected[name]) <= limit, name


@given(cases())
@settings(max_examples=60, deadline=None)
def test_float64_equals_the_reference(case):
    assert_equals_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_errs_little_more_than_the_reference_of_the_same_dtype(dtype, options):
    case = make_case(LARGE, dtype=dtype, seed=4, **options)
    exact, eager = case.run("dense"), case.run("dense", dtype)
    for name, actual in case.run("cpu", dtype).items():
        assert actual.dtype == eager[name].dtype
        # A result may be so small that the reference rounds it exactly; one unit of the dtype is
        # always allowed.
        limit = 2 * error(eager[name], exact[name]) + torch.finfo(actual.dtype).eps
        assert error(actual, exact[name]) <= limit, name


def test_every_leaf_equals_its_own_pass_and_gradients_add_up():
    shape = Shape(heads=2, kv_heads=2, seq=150, d_qk=16, d_v=16)
    case = make_case(shape, seed=5)
    q, k, v = leaves = [case.inputs[name].clone().requires_grad_() for name in "qkv"]
    seen = visibility_mask(case.visible_end)[0]
    is_leaf = ~(seen & ~torch.eye(150, dtype=torch.bool)).any(0)  # seen by no later query
    out = tree_attention(q, k, v, case.visible_end)
    alone = torch.zeros_like(out)
    for query in is_leaf.nonzero().flatten():
        path = seen[query].nonzero().flatten()
        one_pass = F.scaled_dot_product_attention(
            q[:, :, path], k[:, :, path], v[:, :, path], is_causal=True
        )
        alone[:, :, query] = one_pass[:, :, -1]
        torch.testing.assert_close(out[:, :, path], one_pass, rtol=1e-12, atol=1e-12)
    weight = case.dout * is_leaf[:, None]
    actual, expected = (torch.autograd.grad(x, leaves, weight) for x in (out, alone))
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) <= 1e-10


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_larger_than_tiles_and_windows(options):
    """A block over the whole row, in whose first tile a query sees the last key."""
    ends = torch.full((1, 300), 300, dtype=torch.int32)
    case = make_case(Shape(heads=4, seq=300), visible_end=ends, **options)
    begins = torch.zeros_like(ends)
    begins[0, 280:] = 280
    case.options["visible_begin"] = begins
    assert_equals_reference(case)


def test_blocks_of_one_token_are_text():
    case = make_case(LARGE, window=30, seed=3)
    expected = case.run("cpu")
    index = torch.arange(LARGE.seq, dtype=torch.int32)
    case.options["visible_begin"] = index.expand(LARGE.batch, -1)
    assert all(torch.equal(x, expected[name]) for name, x in case.run("cpu").items())


@pytest.mark.parametrize("seq", [0, 1])
def test_rows_of_no_and_one_token(seq):
    assert_equals_reference(make_case(Shape(seq=seq), sinks=True, window=1))


def test_no_batch():
    result = make_case(Shape(batch=0, seq=5), sinks=True).run("cpu")
    assert result["out"].shape == (0, 2, 5, 8)
    assert torch.equal(result["dsinks"], torch.zeros(2, dtype=torch.float64))


def test_strided_inputs_and_layout_of_the_output():
    case = make_case(Shape(heads=4, kv_heads=2, seq=70), seed=6)
    expected = case.run("cpu")
    for name in "qkv":
        x = case.inputs[name]
        wide = torch.full((*x.shape[:3], 3 * x.shape[3]), torch.nan, dtype=x.dtype)
        wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
        case.inputs[name] = wide[..., x.shape[3] : 2 * x.shape[3]].copy_(x)
    case.inputs["v"] = case.inputs["v"].transpose(2, 3).contiguous().transpose(2, 3)
    case.dout = case.dout[:, :, :1].expand_as(case.dout)
    actual = case.run("cpu")
    assert torch.equal(actual["out"], expected["out"])
    assert actual["out"].transpose(1, 2).is_contiguous()
    reference = case.run("dense")
    assert all(error(actual[name], reference[name]) < 1e-10 for name in actual)


@pytest.mark.parametrize("options", [{}, OPTIONS["blocks"], OPTIONS["all"]], ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_results_do_not_depend_on_the_number_of_threads(options, heads):
    shape = Shape(heads=heads, kv_heads=1, seq=700, d_qk=32, d_v=32)
    case = make_case(shape, seed=7, **options)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run("cpu", torch.float32))
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], x) for name, x in results[0].items())


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_the_queries_that_see_it_and_no_other(name, blocks):
    case = make_case(Shape(seq=200, d_qk=16, d_v=16), seed=8, blocks=blocks)
    clean = case.run("cpu", torch.float32)["out"]
    token = 70
    case.inputs[name][:, :, token] = torch.nan
    out = case.run("cpu", torch.float32)["out"]
    begins = case.options.get("visible_begin")
    seen = visibility_mask(case.visible_end, visible_begin=begins)[0, :, token]
    poisoned = torch.arange(200) == token if name == "q" else seen
    assert out[:, :, poisoned].isnan().all()
    torch.testing.assert_close(out[:, :, ~poisoned], clean[:, :, ~poisoned])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("blocks", [False, True])
def test_nan_reaches_the_gradients_of_what_is_seen_and_no_other(name, value, dtype, blocks):
    case = make_case(Shape(seq=200, d_qk=16, d_v=16), seed=8, blocks=blocks)
    begins = case.options.get("visible_begin")
    given = {key: case.inputs[key].to(dtype) for key in "qkv"}
    given["dout"] = torch.randn(1, given["q"].shape[1], 200, 16, dtype=dtype)

    def gradients(given):
        leaves = [given[key].clone().requires_grad_() for key in "qkv"]
        out = tree_attention(*leaves, case.visible_end, visible_begin=begins, impl="cpu")
        return torch.autograd.grad(out, leaves, given["dout"])

    clean = gradients(given)
    token = 70
    given[name][:, :, token] = value
    seen = visibility_mask(case.visible_end, visible_begin=begins)[0]
    queries = torch.arange(200) == token if name in ("q", "dout") else seen[:, token]
    keys = seen[queries].any(0)
    assert keys.any()
    assert (~keys).any()
    for poisoned, actual, expected in zip(
        (queries, keys, keys), gradients(given), clean, strict=True
    ):
        torch.testing.assert_close(actual[:, :, ~poisoned], expected[:, :, ~poisoned])


@pytest.mark.parametrize("impl", ["cpu", "dense"])
@pytest.mark.parametrize("score", [-1.6e38, -3e38, 1.6e38, 1e12])
@pytest.mark.parametrize("sinks", [False, True])
def test_equal_scores_of_any_size_share_the_probability(impl, score, sinks):
    q = torch.full((1, 2, 100, 1), abs(score) ** 0.5)
    k = q * (1 if score > 0 else -1)
    v = torch.arange(100.0).expand(1, 2, 100).unsqueeze(-1)
    ends = torch.full((1, 100), 100, dtype=torch.int32)
    # A sink far below the keys takes nothing, one far above them takes all.
    sink = torch.full((2,), -3.4e38) if sinks else None
    out, lse = tree_attention(q, k, v, ends, scale=1.0, impl=impl, sinks=sink, return_lse=True)
    torch.testing.assert_close(out[0, 0, :, 0], torch.arange(100.0) / 2)
    torch.testing.assert_close(lse, torch.full_like(lse, score))


@pytest.mark.parametrize("impl", ["cpu", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinite_sinks_take_all_or_nothing(impl, dtype):
    case = make_case(Shape(heads=3, kv_heads=3, seq=100), seed=3)
    leaves = [case.inputs[name].to(dtype).requires_grad_() for name in "qkv"]
    sinks = torch.tensor([torch.inf, -torch.inf, 0.5], dtype=dtype, requires_grad=True)
    plain = tree_attention(*leaves, case.visible_end, impl=impl)
    out, lse = tree_attention(*leaves, case.visible_end, sinks=sinks, impl=impl, return_lse=True)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == torch.inf).all()
    torch.testing.assert_close(out[:, 1], plain[:, 1])
    gradients = torch.autograd.grad(out.pow(2).sum(), [*leaves, sinks])
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, 0] == 0).all()
    assert (gradients[3][:2] == 0).all()
    assert (gradients[3][2] != 0).all()


@pytest.mark.parametrize("impl", ["cpu", "dense"])
def test_positions_may_be_as_large_as_their_type(impl):
    last = 2**31 - 1
    positions = torch.tensor([[0, 1, last - 1, last]], dtype=torch.int32)
    ends = torch.full((1, 4), 4, dtype=torch.int32)
    q = torch.randn(1, 1, 4, 8)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    for window, expected in (
        (1, [1, 2, 4, 8]),
        (2, [1, 1.5, 4, 6]),
        (last, [1, 1.5, 7 / 3, 14 / 3]),
    ):
        out = tree_attention(q * 0, q, v, ends, positions=positions, window=window, impl=impl)
        torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float32))


def test_negative_positions_are_refused():
    positions = torch.tensor([[0, 1, -(2**31), 2]], dtype=torch.int32)
    q = torch.randn(1, 1, 4, 8)
    ends = torch.full((1, 4), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="positions has -2147483648, expected none negative"):
        tree_attention(q, q, q, ends, positions=positions, window=2, impl="cpu")


def test_large_scores_do_not_overflow():
    case = make_case(Shape(seq=100), seed=9)
    case.inputs["q"] *= 1e3
    case.inputs["k"] *= 1e2
    actual, expected = case.run("cpu", torch.float32), case.run("dense")
    assert all(x.isfinite().all() for x in actual.values())
    assert error(actual["out"], expected["out"]) < 1e-2


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512"])
def test_every_instruction_set(variant):
    program = (
        "import torch\n"
        "from tests.attention.test_kernel import LARGE, assert_equals_reference, make_case\n"
        "options = {'window': 30, 'softcap': 2.0, 'sinks': True}\n"
        "assert_equals_reference(make_case(LARGE, **options))\n"
        "assert_equals_reference(make_case(LARGE, **options, blocks=True))\n"
        "case = make_case(LARGE, softcap=2.0, seed=1)\n"
        "for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):\n"
        "    actual, expected = case.run('cpu', dtype), case.run('dense')\n"
        "    for name, x in actual.items():\n"
        "        assert ((x - expected[name]).abs().max() / expected[name].abs().max()) < limit, "
        "name\n"
        "print(torch.ops.onepass.cpu_build())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEPASS_CPU_VARIANT": variant},
        capture_output=True,
        text=True,
    )
    if "expected one that this processor has" in run.stderr:
        pytest.skip(f"this processor has no {variant}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{variant}, ")
