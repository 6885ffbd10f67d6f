"""The CUDA kernels within PyTorch: compilation, checkpointing, graphs, memory, errors, tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from onepass_trl.attention import cuda_library, tree_attention
from onepass_trl.attention.self_check.comparison import deterministic_mode
from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.attention.cases import error
from tests.attention.rows import chat_row
from tests.models import make_model

from .device import BF16, DEVICE, IMPL, Kernel, built_kernels, case_on_device

ROOT = Path(__file__).parents[2]
KERNEL: Kernel = built_kernels()[0]
ALL = {"window": 40, "softcap": 2.0, "sinks": True}


def leaves_of(case) -> dict[str, Tensor]:
    return {name: x.to(KERNEL.dtype).requires_grad_() for name, x in case.inputs.items()}


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_full_graph(backend, options):
    case = case_on_device(KERNEL.shape(2, 4, 2, 150), KERNEL.dtype, **options)

    @torch.compile(fullgraph=True, backend=backend)
    def run(visible_end, leaves):
        return tree_attention(
            **leaves, visible_end=visible_end, **case.options, impl=IMPL, return_lse=True
        )

    leaves = leaves_of(case)
    with deterministic_mode():
        expected = case.run(IMPL, KERNEL.dtype)
        out, lse = run(case.visible_end, leaves)
        gradients = torch.autograd.grad(
            [out, lse], list(leaves.values()), [case.dout.to(out.dtype), case.dlse.to(lse.dtype)]
        )
    for actual, name in zip((out, lse, *gradients), expected, strict=True):
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    case = case_on_device(KERNEL.shape(2, 4, 2, 150), KERNEL.dtype)
    leaves = list(leaves_of(case).values())

    def run(*tensors: Tensor) -> Tensor:
        return tree_attention(*tensors, case.visible_end, impl=IMPL)

    dout = case.dout.to(KERNEL.dtype)
    with deterministic_mode():
        expected = torch.autograd.grad(run(*leaves), leaves, dout)
        checkpoint(run, *leaves, use_reentrant=use_reentrant).backward(dout)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_autocast():
    case = case_on_device(KERNEL.shape(1, 2, 1, 150), BF16)
    q, k, v = (x.float().requires_grad_() for x in case.inputs.values())
    with torch.autocast(DEVICE, dtype=BF16):
        out = tree_attention(q, k, v, case.visible_end, impl=IMPL)
    expected = tree_attention(
        *(x.detach().to(BF16) for x in (q, k, v)), case.visible_end, impl=IMPL
    )
    assert out.dtype == BF16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_a_model_gives_what_it_gives_with_the_dense_reference():
    model = make_model("qwen3", head_dim=64).to(DEVICE, BF16)
    use_onepass_attention(model)
    visible_end = chat_row(5, 5, 40).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, visible_end.shape, generator=generator).to(DEVICE)
    position_ids = torch.arange(ids.shape[1], device=DEVICE)[None]
    results = {}
    for impl in ("dense", IMPL):
        model.zero_grad()
        logits = model(
            ids, position_ids=position_ids, visible_end=visible_end, attention_impl=impl
        ).logits
        logits.float().logsumexp(-1).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results[impl] = [logits.detach(), *gradients]
    for actual, expected in zip(results[IMPL], results["dense"], strict=True):
        assert error(actual, expected) < 0.1  # two layers in bfloat16: a seam gone wrong is 1


def test_graphs_replay_on_new_trees(gpu):
    """The plan is made on the device within the graph: no replay works on an old one."""
    cases = [case_on_device(KERNEL.shape(2, 4, 2, 500), KERNEL.dtype, seed=s) for s in range(3)]
    tensors = [x.to(KERNEL.dtype) for x in cases[0].inputs.values()]
    visible_end = cases[0].visible_end.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tree_attention(*tensors, visible_end, impl="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(*tensors, visible_end, impl="cuda")
    for case in cases:
        visible_end.copy_(case.visible_end)
        graph.replay()
        expected = tree_attention(*tensors, case.visible_end, impl="cuda")
        assert torch.equal(out, expected)


def test_the_plan_follows_changes_in_place():
    cases = [case_on_device(KERNEL.shape(1, 2, 1, 500), KERNEL.dtype, seed=s) for s in range(2)]
    tensors = [x.to(KERNEL.dtype) for x in cases[0].inputs.values()]
    visible_end = cases[0].visible_end.clone()
    for case in cases:
        visible_end.copy_(case.visible_end)
        actual = tree_attention(*tensors, visible_end, impl=IMPL)
        assert torch.equal(actual, tree_attention(*tensors, case.visible_end, impl=IMPL))


@pytest.mark.parametrize("same_bits", [False, True])
def test_memory_at_131072_tokens(gpu, same_bits):
    """No more than the tensors themselves, three numbers per query, 64 bytes per token and one dq
    in float32.
    """
    seq, heads, kv_heads, d = 131_072, 32, 8, KERNEL.d_qk
    visible_end = chat_row(40, 20, 500)[0]
    visible_end = (visible_end + torch.arange(0, seq, len(visible_end))[:, None]).flatten()[:seq]
    visible_end = visible_end.clamp(max=seq).int()[None].to(DEVICE)

    def normal(num_heads: int) -> Tensor:
        x = torch.randn(1, seq, num_heads, d, device=DEVICE, dtype=KERNEL.dtype)
        return x.transpose(1, 2)

    q, k, v = (normal(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
    dout = normal(heads)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with deterministic_mode(same_bits):
        out = tree_attention(q, k, v, visible_end, impl="cuda")
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    peak = torch.cuda.max_memory_allocated() - before
    tensors = sum(x.numel() * x.element_size() for x in (out, *gradients))
    lse_and_statistics = 3 * 4 * heads * seq
    dq_sums = 4 * heads * seq * d
    assert peak <= tensors + lse_and_statistics + dq_sums + 64 * seq


def test_131072_tokens_against_flex(gpu):
    seq, d = 131_072, KERNEL.d_qk
    row = chat_row(40, 20, 500)[0]
    visible_end = (row + torch.arange(0, seq, len(row))[:, None]).flatten()[:seq]
    visible_end = visible_end.clamp(max=seq).int()[None].to(DEVICE)
    x = torch.randn(4, seq, 2, d, device=DEVICE, dtype=KERNEL.dtype)
    q, k, v, dout = (part[None].transpose(1, 2) for part in x)
    results = []
    for impl in ("flex", "cuda"):
        leaves = [part.detach().requires_grad_() for part in (q, k, v)]
        out, lse = tree_attention(*leaves, visible_end, impl=impl, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out, leaves, dout)])
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) < 0.02  # both round P and dS; test_parity.py is exact


BAD_INPUTS = {
    "device": (lambda q: {"k": q.cpu()}, "k is on cpu, expected cuda:0 as q"),
    "dtype": (lambda q: dict.fromkeys("qkv", q.float()), "impl='cuda': q is torch.float32"),
    "head size": (lambda q: dict.fromkeys("qkv", q[..., :40]), "head sizes d_qk 40 and d_v 40"),
    "scale": (lambda q: {"scale": -1.0}, "scale is -1.0, expected a positive number"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_refused_by_name(gpu, change, message):
    q = torch.zeros(1, 2, 10, KERNEL.d_qk, device=DEVICE, dtype=KERNEL.dtype)
    v = torch.zeros(1, 2, 10, KERNEL.d_v, device=DEVICE, dtype=KERNEL.dtype)
    ends = torch.full((1, 10), 10, dtype=torch.int32, device=DEVICE)
    arguments = {"q": q, "k": q, "v": v, "visible_end": ends, "impl": "cuda"}
    with pytest.raises(ValueError, match=message):
        tree_attention(**{**arguments, **change(q)})


def test_the_op_checks_what_memory_safety_needs(gpu):
    q = torch.zeros(1, 2, 10, KERNEL.d_qk, device=DEVICE, dtype=KERNEL.dtype)
    v = torch.zeros(1, 2, 10, KERNEL.d_v, device=DEVICE, dtype=KERNEL.dtype)
    ends = torch.full((1, 10), 10, dtype=torch.int32, device=DEVICE)
    plan = cuda_library.plan_of(ends, None, 0)
    for change, message in (
        ({1: q[:, :, :5]}, "k is"),
        ({2: v.float()}, "v is Float"),
        ({3: ends.cpu()}, "visible_end is on another device"),
        ({3: ends.long()}, "visible_end is Long"),
        ({5: torch.zeros(3, device=DEVICE)}, r"sinks is Float \(3\), expected Float \(2\)"),
        ({6: 0.0}, "scale is 0"),
        ({7: 4}, "window is 4, without positions"),
        ({9: plan[:, 1:]}, "plan is Int"),
    ):
        arguments = [q, q, v, ends, None, None, 1.0, 0, 0.0, plan]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.onepass.tree_attention(*arguments)


@pytest.mark.parametrize("seq", [0, 1])
def test_rows_of_no_and_one_token(seq):
    case = case_on_device(KERNEL.shape(1, 2, 1, seq), KERNEL.dtype, sinks=True)
    result = case.run(IMPL, KERNEL.dtype)
    assert result["out"].shape == (1, 2, seq, KERNEL.d_v)
    assert all(x.isfinite().all() for x in result.values())


NOT_A_TREE = """
import torch
from tests.gpu.device import built_kernels, case_on_device
kernel = built_kernels()[0]
case = case_on_device(kernel.shape(1, 2, 1, 200), kernel.dtype)
case.visible_end[0, 70] = 3
case.run("cuda", kernel.dtype)
torch.cuda.synchronize()
print("ran")
"""


def run_program(*arguments: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*launcher, sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_ends_that_are_none_stop_the_kernel(gpu):
    run = run_program("-c", NOT_A_TREE)
    assert run.returncode != 0
    assert "visible_end[j] has to be in [j + 1, seq]" in run.stdout + run.stderr
    assert "device-side assert triggered" in run.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer on the PATH")
    launcher = (sanitizer, "--tool", tool, "--error-exitcode", "9")
    run = run_program("-m", "tests.gpu.run_kernels", "small", launcher=launcher)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "ran" in run.stdout
