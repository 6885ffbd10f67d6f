"""Every input that does not fit is an error that says what it is and what was expected."""

import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from onepass_trl.attention import available_impls, cuda_library, tree_attention
from onepass_trl.attention.implementations import flex
from onepass_trl.attention.implementations.base import Call, refuse_blocks
from onepass_trl.attention.implementations.registry import IMPLEMENTATIONS, Impl
from onepass_trl.visibility import VisibilityError, check_visible_begin, check_visible_end

Q = torch.zeros(2, 4, 6, 8)
KV = torch.zeros(2, 2, 6, 8)
ENDS = torch.full((2, 6), 6, dtype=torch.int32)
POSITIONS = torch.arange(6, dtype=torch.int32).expand(2, -1)

BAD_INPUTS = {
    "q dim": ({"q": Q[0]}, r"q has shape \(4, 6, 8\), expected \(batch, heads, seq, head_dim\)"),
    "k seq": ({"k": KV[:, :, :5]}, r"k has shape \(2, 2, 5, 8\), expected .* no KV cache"),
    "k batch": ({"k": KV[:1]}, r"k has shape \(1, 2, 6, 8\)"),
    "v dim": ({"v": KV[0]}, r"v has shape \(2, 6, 8\)"),
    "k dtype": ({"k": KV.double()}, r"k is torch.float64, expected torch.float32"),
    "head_dim": ({"k": KV[..., :4]}, "k has head_dim 4 and q 8"),
    "no head_dim": ({"q": Q[..., :0], "k": KV[..., :0]}, "at least 1"),
    "groups": ({"q": Q[:, :3]}, "q has 3 heads, k 2 and v 2"),
    "kv heads": ({"v": KV[:, :1]}, "q has 4 heads, k 2 and v 1"),
    "ends dtype": (
        {"visible_end": ENDS.long()},
        "visible_end is torch.int64 .*expected torch.int32",
    ),
    "ends shape": (
        {"visible_end": ENDS[:1]},
        r"visible_end .* shape \(1, 6\), expected .*\(2, 6\)",
    ),
    "ends device": ({"visible_end": ENDS.to("meta")}, "visible_end is on meta, expected cpu"),
    "k device": ({"k": KV.to("meta")}, "k is on meta, expected cpu"),
    "window": ({"window": 0, "positions": POSITIONS}, "window is 0, expected at least 1"),
    "no positions": ({"window": 3}, "a window is measured in positions"),
    "positions dtype": ({"positions": POSITIONS.long()}, "positions is torch.int64"),
    "positions shape": ({"positions": POSITIONS[:, :4]}, r"positions .* shape \(2, 4\)"),
    "positions device": ({"positions": POSITIONS.to("meta")}, "positions is on meta"),
    "begins dtype": ({"visible_begin": POSITIONS.long()}, "visible_begin is torch.int64"),
    "begins shape": ({"visible_begin": POSITIONS[:1]}, r"visible_begin .* shape \(1, 6\)"),
    "begins device": ({"visible_begin": POSITIONS.to("meta")}, "visible_begin is on meta"),
    "softcap": ({"softcap": 0.0}, "softcap is 0.0, expected a positive number"),
    "softcap nan": ({"softcap": float("nan")}, "softcap is nan"),
    "sinks shape": ({"sinks": torch.zeros(2)}, r"sinks is torch.float32 of shape \(2,\), .*\(4,\)"),
    "sinks dtype": ({"sinks": torch.zeros(4, dtype=torch.int32)}, "expected a floating dtype"),
    "sinks device": ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta"),
    "impl": (
        {"impl": "fast"},
        "impl is 'fast', expected one of auto, cuda, cpu, varlen, flex, flex_flash, dense",
    ),
    "cuda": ({"impl": "cuda"}, "impl='cuda' and q is on cpu: use impl='auto'"),
    "float16": (
        {"q": Q.half(), "k": KV.half(), "v": KV.half()},
        "impl='cpu': q is torch.float16, expected one of torch.float32, torch.float64, "
        "torch.bfloat16",
    ),
    "flex float64": (
        {"q": Q.double(), "k": KV.double(), "v": KV.double(), "impl": "flex"},
        "impl='flex': q is torch.float64",
    ),
    "device": (
        {
            "q": Q.to("meta"),
            "k": KV.to("meta"),
            "v": KV.to("meta"),
            "visible_end": ENDS.to("meta"),
        },
        "q is on meta, and no implementation is validated",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(**{"q": Q, "k": KV, "v": KV, "visible_end": ENDS, **change})


@pytest.mark.parametrize(
    "ends",
    [[2, 3, 3, 6, 6, 6], [0, 6, 6, 6, 6, 6], [7, 6, 6, 6, 6, 6], [6, 4, 5, 6, 6, 6]],
    ids=str,
)
def test_not_a_tree_is_the_error_of_the_definition(ends):
    row = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(VisibilityError) as expected:
        check_visible_end(row.numpy())
    with pytest.raises(VisibilityError) as actual:
        tree_attention(Q, KV, KV, torch.stack([ENDS[0], row]))
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        ([0, 1, 3, 3, 4, 5], [6] * 6),  # after the token
        ([0, -1, 2, 3, 4, 5], [6] * 6),
        ([0, 1, 1, 0, 4, 5], [6] * 6),  # not a run
        ([0, 0, 0, 0, 4, 5], [6, 6, 6, 4, 6, 6]),  # a branch cuts it
        ([1, 1, 2, 3, 4, 5], [6] * 6),
    ],
    ids=str,
)
def test_not_a_block_is_the_error_of_the_definition(begins, ends):
    rows = torch.tensor([begins, ends], dtype=torch.int32)
    with pytest.raises(VisibilityError) as expected:
        check_visible_begin(*rows.numpy())
    with pytest.raises(VisibilityError) as actual:
        tree_attention(
            Q,
            KV,
            KV,
            torch.stack([ENDS[0], rows[1]]),
            visible_begin=torch.stack([POSITIONS[0], rows[0]]),
        )
    assert str(actual.value) == str(expected.value)


def test_implementations_without_blocks_say_so(monkeypatch):
    """Both by name, and "auto", which on a CUDA device takes none of them."""
    q, kv = Q.bfloat16(), KV.bfloat16()
    call = Call(q, kv, kv, ENDS, 1.0, None, None, None, None, POSITIONS)
    for name in ("cuda", "varlen", "flex_flash"):
        with pytest.raises(ValueError, match=rf"impl='{name}' takes no visible_begin, with which"):
            refuse_blocks(name, call)
    on_cuda = call._replace(q=SimpleNamespace(device=torch.device("cuda", 0), dtype=q.dtype))
    taken = [x.name for x in IMPLEMENTATIONS if x.suits(on_cuda)]
    assert taken == ["flex"]
    monkeypatch.setattr(cuda_library, "missing", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(flex, "_missing_for_flash", lambda _: None)
    for implementation in IMPLEMENTATIONS:
        if implementation.name in ("cuda", "varlen", "flex_flash"):
            with pytest.raises(ValueError, match=f"impl='{implementation.name}' takes no visible"):
                implementation.check(on_cuda)


def test_the_op_checks_what_memory_safety_needs():
    forward = torch.ops.onepass.tree_attention
    backward = torch.ops.onepass.tree_attention_backward
    given = {"q": Q, "k": KV, "v": KV, "visible_end": ENDS, "positions": None, "sinks": None}
    given |= {"scale": 1.0, "window": 0, "softcap": 0.0}
    out, lse = forward(**given)
    results = {"dout": out, "dlse": lse, "out": out, "lse": lse}
    for change, message in (
        ({"q": Q[0]}, "q, k and v have 3, 4 and 4 dimensions"),
        ({"q": Q.half(), "k": KV.half(), "v": KV.half()}, "q is Half"),
        ({"q": Q[:, :3]}, "heads is 3, kv_heads 2"),
        ({"k": KV[:, :, :5]}, r"k is Float \(2, 2, 5, 8\), expected Float \(2, 2, 6, 8\)"),
        ({"v": KV.double()}, "v is Double"),
        ({"visible_end": ENDS[:1]}, r"visible_end is Int \(1, 6\), expected Int \(2, 6\)"),
        ({"visible_end": ENDS.long()}, "visible_end is Long"),
        ({"window": -1}, "window is -1"),
        ({"window": 3}, "window is 3, without positions"),
        ({"window": 3, "positions": ENDS[:, :5]}, "positions is Int"),
        ({"visible_begin": ENDS[:, :5]}, "visible_begin is Int"),
        ({"visible_begin": ENDS}, "visible_begin of row 0 has no blocks"),
        ({"sinks": torch.zeros(3)}, r"sinks is Float \(3\), expected Float \(4\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(**given | change)
        with pytest.raises(RuntimeError, match=message):
            backward(**results, **given | change)
    for name, result in results.items():
        with pytest.raises(RuntimeError, match=f"{name} is Double"):
            backward(**given, **results | {name: result.double()})
        with pytest.raises(RuntimeError, match=rf"{name} is Float \(2, 3"):
            backward(**given, **results | {name: result[:, :3]})


def test_every_name_is_an_implementation():
    assert ("auto", *(implementation.name for implementation in IMPLEMENTATIONS)) == get_args(Impl)


def test_impls_say_where_they_run():
    impls = {impl.name: impl for impl in available_impls()}
    assert list(impls) == ["cuda", "cpu", "varlen", "flex", "flex_flash", "dense"]
    if not torch.cuda.is_available():
        assert impls["cuda"].devices == ()
    assert impls["cpu"].devices == ("cpu",)
    assert "gcc" in impls["cpu"].detail or "clang" in impls["cpu"].detail


def test_without_the_extension_only_its_impl_is_missing():
    program = (
        "import torch\n"
        "def load_library(path): raise OSError(f'no {path.name}')\n"
        "torch.ops.load_library = load_library\n"
        "from onepass_trl.attention import *\n"
        "from onepass_trl.attention import available_impls\n"
        "q = torch.zeros(1, 1, 3, 4); ends = torch.full((1, 3), 3, dtype=torch.int32)\n"
        "tree_attention(q, q, q, ends, impl='dense')\n"
        "assert not available_impls()[1].built\n"
        "try:\n"
        "    tree_attention(q, q, q, ends)\n"
        "except ExtensionNotBuiltError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (
        "the compiled library onepass_trl/_cpu.so cannot be loaded (no _cpu.so): build it with "
        "`pip install --no-build-isolation -e .`"
    ) in run.stdout
