"""The op within PyTorch: gradcheck, opcheck, compilation, checkpointing, autocast."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from onepass_trl.attention import tree_attention

from .cases import Shape, error, make_case

SMALL = Shape(batch=2, heads=4, kv_heads=2, seq=12, d_qk=3, d_v=2)
OPTIONS = [{}, {"window": 4, "softcap": 3.0, "sinks": True, "blocks": True}]


def arguments(case, *, requires_grad=True):
    """The positional arguments of torch.ops.onepass.tree_attention."""
    leaves = {n: x.clone().requires_grad_(requires_grad) for n, x in case.inputs.items()}
    options = case.options
    return (
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.visible_end,
        options["positions"] if options["window"] else None,
        leaves.get("sinks"),
        0.4,
        options["window"] or 0,
        options["softcap"] or 0.0,
        None,
        options.get("visible_begin"),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
def test_gradcheck(options):
    case = make_case(Shape(heads=2, seq=7, d_qk=3, d_v=2), **options)
    q, k, v, ends, positions, sinks, *rest = arguments(case)

    def run(q, k, v, sinks):
        return torch.ops.onepass.tree_attention(q, k, v, ends, positions, sinks, *rest)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=False)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# By opcheck of torch 2.14, which hides it only where warnings aren't errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(options, dtype):
    case = make_case(SMALL, **options)
    case.inputs = {
        n: x.to(torch.float32 if n == "sinks" else dtype) for n, x in case.inputs.items()
    }
    inputs = arguments(case)
    torch.library.opcheck(torch.ops.onepass.tree_attention.default, inputs)
    out, lse = torch.ops.onepass.tree_attention(*arguments(case, requires_grad=False))
    backward = (out.clone(), None, *(x.detach() if torch.is_tensor(x) else x for x in inputs[:3]))
    *rest, plan, begins = arguments(case, requires_grad=False)[3:]
    backward = (*backward, out, lse, *rest, plan, False, begins)
    torch.library.opcheck(torch.ops.onepass.tree_attention_backward.default, backward)


def test_gradient_of_lse_alone():
    case = make_case(SMALL, sinks=True)
    results = []
    for impl in ("cpu", "dense"):
        leaves = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
        _, lse = tree_attention(**leaves, visible_end=case.visible_end, impl=impl, return_lse=True)
        lse.backward(case.dlse)
        results.append([leaves[name].grad for name in ("q", "k", "sinks")])
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) <= 1e-10


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
def test_compile_full_graph(options):
    case = make_case(SMALL, dtype=torch.float32, **options)
    expected = case.run("cpu", torch.float32)
    leaves = {name: x.float().requires_grad_() for name, x in case.inputs.items()}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(visible_end, leaves):
        return tree_attention(**leaves, visible_end=visible_end, **case.options, return_lse=True)

    out, lse = run(case.visible_end, leaves)
    gradients = torch.autograd.grad(
        [out, lse], list(leaves.values()), [case.dout.float(), case.dlse.float()]
    )
    for actual, name in zip((out, lse, *gradients), expected, strict=True):
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    case = make_case(SMALL)
    leaves = [x.clone().requires_grad_() for x in case.inputs.values()]
    out = checkpoint(tree_attention, *leaves, case.visible_end, use_reentrant=use_reentrant)
    out.backward(case.dout)
    case.dlse = torch.zeros_like(case.dlse)
    expected = case.run("cpu")
    for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert error(leaf.grad, expected[name]) < 1e-14


def test_autocast_casts_to_its_dtype():
    case = make_case(SMALL, sinks=True)
    q, k, v, sinks = (x.float().requires_grad_() for x in case.inputs.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tree_attention(q, k.bfloat16(), v, case.visible_end, sinks=sinks)
    expected = tree_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), case.visible_end, sinks=sinks
    )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    assert sinks.grad.dtype == torch.float32


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 4, 7, 8, device="meta", dtype=torch.bfloat16)
    v = torch.empty(2, 2, 7, 6, device="meta", dtype=torch.bfloat16)
    ends = torch.empty(2, 7, device="meta", dtype=torch.int32)
    out, lse = torch.ops.onepass.tree_attention(q, q[:, :2], v, ends, None, None, 1.0, 0, 0.0)
    assert (out.shape, out.dtype) == ((2, 4, 7, 6), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 7), torch.float32)


class BackwardCalls(TorchDispatchMode):
    """Remembers whether each call of the backward op was to be deterministic."""

    def __init__(self):
        super().__init__()
        self.deterministic = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.onepass.tree_attention_backward.default:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False))
            self.deterministic.append(given.get("deterministic", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_bits_are_asked_for_by_the_switch_of_torch(enabled, compiled):
    case = make_case(SMALL)
    leaves = [x.clone().requires_grad_() for x in case.inputs.values()]
    attend = torch.compile(tree_attention, backend="aot_eager") if compiled else tree_attention
    torch.use_deterministic_algorithms(enabled)
    try:
        with BackwardCalls() as calls:
            attend(*leaves, case.visible_end).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls.deterministic == [enabled]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_forward_mode_is_refused(needs_gradient):
    q = torch.randn(1, 2, 8, 4, requires_grad=needs_gradient)
    visible_end = torch.full((1, 8), 8, dtype=torch.int32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match=r"forward-mode .* Use impl='dense'"):
            tree_attention(dual, q, q, visible_end)
        assert tree_attention(q, q, q, visible_end).isfinite().all()
        out = tree_attention(dual, q, q, visible_end, impl="dense")
        assert forward_ad.unpack_dual(out).tangent is not None
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: tree_attention(q, q, x, visible_end), (q,), (q,))


def test_second_derivatives_are_refused():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    visible_end = torch.full((1, 8), 8, dtype=torch.int32)
    out = tree_attention(q, q, q, visible_end)
    (gradient,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='dense'"):
        gradient.pow(2).sum().backward()
