"""FlexAttention with the same rule. On a CPU it runs eagerly and has no backward: compiled parity
needs a GPU.
"""

import gc
import importlib.util
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from onepass_trl.attention import tree_attention
from onepass_trl.attention.implementations import flex
from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.registry import choose
from onepass_trl.attention.reference import dense_tree_attention, visibility_mask

from ..cases import Shape, error, make_case

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("seq", [0, 1, 128, 300])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 2.0, "sinks": True}])
def test_equals_the_reference(seq, options, blocks):
    options = {**options, "blocks": blocks}
    shape = Shape(batch=2, heads=4, kv_heads=2, seq=seq, d_qk=16, d_v=8)
    case = make_case(shape, dtype=torch.float32, **options)
    inputs = {name: x.float() for name, x in case.inputs.items()}
    expected = tree_attention(
        **inputs, visible_end=case.visible_end, **case.options, impl="dense", return_lse=True
    )
    actual = tree_attention(
        **inputs, visible_end=case.visible_end, **case.options, impl="flex", return_lse=True
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert error(a, e) < 1e-5


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("for_flash", "both_ways"), [(False, False), (True, False), (False, True)])
def test_blocks_are_those_of_the_dense_mask(window, for_flash, both_ways):
    size = 256 if for_flash else 128
    rows = 1024 // size
    case = make_case(Shape(batch=3, seq=1000), seed=1, blocks=both_ways)
    positions, begins = case.options["positions"], case.options.get("visible_begin")
    blocks = flex.build_block_mask(
        case.visible_end, positions, window, for_flash=for_flash, visible_begin=begins
    )
    assert list(blocks.BLOCK_SIZE) == [size, 128]
    mask = visibility_mask(case.visible_end, positions, window, begins)
    padded = torch.nn.functional.pad(mask, (0, 24, 0, 24)).view(3, rows, size, 8, 128)
    inside = torch.ones(1000, 1000, dtype=torch.bool)
    outside = ~torch.nn.functional.pad(inside, (0, 24, 0, 24)).view(rows, size, 8, 128)
    some, all_ = padded.any(4).any(2), (padded | outside).all(4).all(2)

    def listed(counts, indices):
        visited = torch.zeros(3, rows, 8, dtype=torch.bool)
        for b, q in torch.cartesian_prod(torch.arange(3), torch.arange(rows)).tolist():
            visited[b, q, indices[b, 0, q, : counts[b, 0, q]].long()] = True
        return visited

    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    assert not (some & ~(partial | full)).any()
    assert not (full & ~all_).any()
    if window is None:
        assert torch.equal(partial | full, some)


def test_sinks_have_the_gradients_of_the_reference():
    case = make_case(Shape(heads=2, kv_heads=2), sinks=True)
    results = []
    for through_lse in (False, True):
        leaves = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
        sinks = leaves.pop("sinks") if through_lse else None
        out, lse = tree_attention(
            **leaves, visible_end=case.visible_end, impl="dense", return_lse=True
        )
        if through_lse:
            out, lse = flex.add_sinks(out, lse, sinks)
            leaves["sinks"] = sinks
        grads = torch.autograd.grad([out, lse], list(leaves.values()), [case.dout, case.dlse])
        results.append([out, lse, *grads])
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) < 1e-12


def test_layers_share_block_masks_until_the_row_goes():
    case = make_case(Shape(), seed=2)
    positions, ends = case.options["positions"], case.visible_end.clone()
    held = len(flex._block_masks._known)
    begins = torch.arange(ends.shape[1], dtype=torch.int32)[None]

    q = case.inputs["q"]
    calls = [Call(q, q, q, ends, 1.0, None, None, None, None)]

    def remembered(positions, window, begins=None):
        changes = dict(positions=positions, window=window, visible_begin=begins)
        return flex._remembered_block_mask(calls[0]._replace(**changes))

    first = remembered(positions, 5)
    assert remembered(positions, 5) is first
    assert remembered(positions, 6) is not first
    assert remembered(positions, None) is remembered(None, None)
    assert remembered(positions, 5, begins) is remembered(positions, 5, begins)
    assert remembered(positions, 5, begins) is not remembered(positions, 5)
    assert remembered(None, None, begins) is not remembered(None, None)
    assert remembered(None, None, begins) is not remembered(None, None, begins.clone())
    positions[0, 0] += 0  # changed in place: a new version
    assert remembered(positions, 5) is not first
    assert len(flex._block_masks._known) == held + 1
    del ends, first, calls[0]
    gc.collect()
    assert len(flex._block_masks._known) == held


@pytest.fixture
def compilations(monkeypatch):
    """Count compilations of FlexAttention, by a backend that runs what it is given."""
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    flex._flex_attention.cache_clear()
    monkeypatch.setattr(flex, "_flex_attention", partial(flex._flex_attention, counter))
    yield counter
    torch.compiler.reset()


def compiled(seq: int, window: int | None = None, softcap: float | None = None, batch: int = 1):
    shape = Shape(batch=batch, heads=2, kv_heads=1, seq=seq, d_qk=16, d_v=16)
    case = make_case(shape, window=window, softcap=softcap, dtype=torch.float32)
    q, k, v = (case.inputs[name].float() for name in "qkv")
    return flex._compiled(
        q,
        k,
        v,
        score_mod=None if softcap is None else flex._softcap_mod(softcap),
        block_mask=flex.build_block_mask(case.visible_end, case.options["positions"], window),
        enable_gqa=True,
    )


def test_more_variants_than_torch_compiles_by_itself(compilations):
    for batch in (1, 2):
        for seq in (100, 300, 500):
            for window in (None, 5, 40):
                compiled(seq, window, softcap=2.0, batch=batch)
                compiled(seq, window, batch=batch)
    assert torch._dynamo.config.recompile_limit < compilations.frame_count <= 16


def test_too_many_variants_are_an_error_and_never_eager(compilations, monkeypatch):
    monkeypatch.setattr(flex, "MAX_VARIANTS", 2)
    compiled(100)
    compiled(100, window=5)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(100, softcap=2.0)


@pytest.mark.parametrize(
    ("head_dim", "kib", "smaller"), [(256, 99, True), (256, 227, False), (128, 99, False)]
)
def test_tiles_fit_into_shared_memory(monkeypatch, head_dim, kib, smaller):
    properties = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    q = torch.empty(1, 1, 4, head_dim, dtype=torch.bfloat16)
    options = flex._kernel_options(Call(q, q, q, torch.empty(0), 1.0, None, None, None, None))
    assert options["ROWS_GUARANTEED_SAFE"]
    assert (options.get("BLOCK_M") == 32) is smaller


def test_float32_is_said_to_be_slow_once(monkeypatch, caplog):
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    flex._warn_of_float32.cache_clear()
    x = torch.empty(1, 1, 4, 64)
    for _ in range(2):
        flex._kernel_options(Call(x, x, x, torch.empty(0), 1.0, None, None, None, None))
    assert caplog.text.count("FlexAttention is slow in float32") == 1


def call_of(case, **changes) -> Call:
    q, k, v = (case.inputs[name].float() for name in "qkv")
    options = {"scale": 0.3, "sinks": None, **case.options, **changes}
    return Call(q, k, v, case.visible_end, **options)


@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 2.0}])
def test_what_flash_is_given_is_the_reference(options):
    shape = Shape(batch=2, heads=4, kv_heads=2, seq=300, d_qk=16, d_v=8)
    call = call_of(make_case(shape, dtype=torch.float32, **options))
    out, aux = flex_attention(**flex._flash_arguments(call))
    for actual, expected in zip(
        (out, aux.lse), dense_tree_attention(**call._asdict()), strict=True
    ):
        assert error(actual, expected) < 1e-5


def captured_numbers(score_mods, block_masks) -> list:
    """Return what FlexAttention's compiled modifications read besides tensors and their sizes."""
    captured = []

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.flex_attention:
                captured.extend(x.meta["example_value"] for x in (*node.args[-2], *node.args[-1]))
        return graph

    torch.compiler.reset()
    compute = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
    q = torch.zeros(1, 1, 300, 16)
    for score_mod, block_mask in zip(score_mods, block_masks, strict=True):
        compute(q, q, q, score_mod=score_mod, block_mask=block_mask)
    torch.compiler.reset()
    tensors = [x for x in captured if isinstance(x, torch.Tensor)]
    sizes = [str(size) for x in tensors for size in x.shape]
    assert len(tensors) >= 2
    return [x for x in captured if not isinstance(x, torch.Tensor) and str(x) not in sizes]


def test_flash_is_given_no_number_of_python():
    """It refuses them, and torch keeps a number that has changed as one."""
    options = [dict(window=5, softcap=2.0), dict(window=40, softcap=3.0)]
    cases = [make_case(Shape(heads=1, seq=300), dtype=torch.float32, **x) for x in options]
    given = [flex._flash_arguments(call_of(case)) for case in cases]
    assert (
        captured_numbers(*zip(*[(x["score_mod"], x["block_mask"]) for x in given], strict=True))
        == []
    )
    masks = [
        flex.build_block_mask(case.visible_end, case.options["positions"], case.options["window"])
        for case in cases
    ]
    assert captured_numbers([None, None], masks) != []  # FlexAttention's own backend takes them


@pytest.fixture
def hopper(monkeypatch):
    """A device and packages that have the backend FLASH."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(flex, "FLASH_SINCE", SimpleNamespace(installed=True, version="2.13"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def call(dtype=torch.bfloat16, sinks=None) -> Call:
        x = SimpleNamespace(shape=(1, 2, 4, 64), dtype=dtype, device=torch.device("cuda", 0))
        return Call(x, x, x, torch.zeros(1, 4, dtype=torch.int32), 1.0, None, None, None, sinks)

    return call


def test_flash_runs_by_its_backend(hopper, monkeypatch):
    assert choose("flex_flash", hopper()).name == "flex_flash"
    case = make_case(Shape())
    given = {}

    def compiled(**arguments):
        given.update(arguments)
        return torch.ones(1), SimpleNamespace(lse=torch.zeros(1))

    monkeypatch.setattr(flex, "_compiled", compiled)
    out, lse = flex._run_flash(call_of(case))
    assert (float(out), float(lse)) == (1, 0)
    assert given["kernel_options"] == {"BACKEND": "FLASH"}


def test_flash_says_what_is_missing(hopper, monkeypatch):
    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=rf"impl='flex_flash'.*{message}"):
            choose("flex_flash", hopper(**changes))

    refused("expected one of torch.bfloat16, torch.float16", dtype=torch.float32)
    refused("sinks need a gradient through lse.*use impl='flex'", sinks=torch.zeros(2))
    with monkeypatch.context() as context:
        context.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        refused("isn't deterministic")
    for missing in ("flash_attn", "flash_attn.cute"):
        with monkeypatch.context() as context:
            context.setattr(
                importlib.util, "find_spec", lambda name, m=missing: None if name == m else name
            )
            refused("pip install --pre flash-attn-4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (12, 0))
    refused("compute capability 9.0 or 10.x and the device has 12.0")
    monkeypatch.setattr(flex.FLASH_SINCE, "installed", False)
    refused("it needs torch 2.13")


def test_flash_needs_a_cuda_device():
    case = make_case(Shape())
    with pytest.raises(ValueError, match="impl='flex_flash' and q is on cpu"):
        tree_attention(**case.inputs, visible_end=case.visible_end, impl="flex_flash")
