"""Tree attention by torch's variable-length kernels, whose place eager ones take on a CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given

from onepass_trl import OnePassCollator, build_tree, linearize
from onepass_trl.attention import tree_attention
from onepass_trl.attention.implementations import registry, varlen
from onepass_trl.attention.implementations.base import Call
from onepass_trl.attention.implementations.varlen import VARLEN, chains_of
from onepass_trl.attention.reference import dense_tree_attention
from onepass_trl.data.layout import concatenate
from onepass_trl.visibility import dense_mask
from tests.attention.cases import Shape, error, make_case
from tests.attention.flash import flash_attention_on_cpu
from tests.conversations import random_chat
from tests.data.strategies import pass_lists


def seen(chains, num_tokens: int) -> np.ndarray:
    """What each query sees by the chains, ``(num_tokens, num_tokens)`` bool."""
    matrix = np.zeros((num_tokens, num_tokens), dtype=bool)
    starts = [np.concatenate([[0], ends]) for ends in (chains.query_ends, chains.key_ends)]
    for q0, q1, k0, k1 in zip(
        starts[0][:-1], starts[0][1:], starts[1][:-1], starts[1][1:], strict=True
    ):
        queries, keys = chains.queries[q0:q1], chains.keys[k0:k1]
        assert keys[len(keys) - len(queries) :].tolist() == queries.tolist()
        for number, query in enumerate(queries):
            matrix[query, keys[: len(keys) - len(queries) + number + 1]] = True
    return matrix


@given(pass_lists(), pass_lists())
def test_chains_see_what_the_rule_says(first, second):
    rows = [linearize(build_tree(first)), linearize(build_tree(second))]
    row = concatenate(rows)
    chains = chains_of(row.visible_end[None], row.position_ids[None])
    assert sorted(chains.queries) == list(range(len(row)))
    assert np.array_equal(seen(chains, len(row)), dense_mask(row.visible_end))


@pytest.mark.parametrize("seed", range(20))
def test_rows_in_any_order_of_children(seed):
    """Light children may come first: those of others' layouts."""
    ends = make_case(Shape(batch=3, seq=60), seed=seed).visible_end.numpy()
    chains = chains_of(ends)
    matrix = seen(chains, 180)
    for row in range(3):
        own = slice(60 * row, 60 * row + 60)
        assert np.array_equal(matrix[own, own], dense_mask(ends[row]))
        matrix[own, own] = False
    assert not matrix.any()


def test_a_chat_has_a_chain_for_each_turn_and_the_trunk_is_one():
    passes = random_chat(4)
    row = linearize(build_tree(passes))
    chains = chains_of(row.visible_end[None])
    lengths = np.diff(np.concatenate([[0], chains.query_ends]))
    num_copies = int((row.multiplicity == 0).sum())
    assert len(lengths) == len(passes) + num_copies
    assert lengths.max() == len(passes[-1])
    assert chains.keys.size == sum(map(len, passes)) + sum(
        row.position_ids[row.multiplicity == 0] + 1
    )


def test_an_empty_row_has_no_chain():
    assert chains_of(np.zeros((2, 0), dtype=np.int32)).query_ends.size == 0


def varlen_tree_attention(
    q, k, v, visible_end, *, scale, positions=None, window=None, softcap=None, sinks=None
):
    """The implementation past its check of the device, from arguments of the reference."""
    positions = None if window is None else positions
    return VARLEN.run(Call(q, k, v, visible_end, scale, positions, window, softcap, sinks))


def run(case, attention, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Output, lse and gradients; lse has none in variable-length kernels."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in case.inputs.items()}
    out, lse = attention(**leaves, visible_end=case.visible_end, scale=0.3, **case.options)
    grads = torch.autograd.grad(out, list(leaves.values()), case.dout.to(dtype))
    return {"out": out, "lse": lse, **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("window", [None, 2, 7, 1000])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(batch=2, heads=4, kv_heads=2, seq=70, d_qk=16, d_v=16),
        Shape(heads=3, kv_heads=1, seq=40, d_qk=12, d_v=6),
        Shape(seq=1),
    ],
    ids=["gqa", "padded_heads", "one_token"],
)
def test_equals_the_reference(shape, window, sinks):
    case = make_case(shape, window=window, sinks=sinks, seed=3)
    with flash_attention_on_cpu() as calls:
        actual = run(case, varlen_tree_attention)
    assert len(calls) == 1
    expected = run(case, dense_tree_attention)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.shape == expected[name].shape
        assert error(x, expected[name]) < 1e-12, name


def test_half_precision_keeps_its_dtype():
    case = make_case(Shape(heads=2, kv_heads=1, seq=50, d_qk=16, d_v=16), sinks=True)
    case.inputs["sinks"] = case.inputs["sinks"].float()
    leaves = {
        name: (x if name == "sinks" else x.bfloat16()).requires_grad_()
        for name, x in case.inputs.items()
    }
    with flash_attention_on_cpu():
        out, lse = varlen_tree_attention(**leaves, visible_end=case.visible_end, scale=0.3)
        out.sum().backward()
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert {x.grad.dtype for x in (leaves["q"], leaves["k"], leaves["v"])} == {torch.bfloat16}
    assert leaves["sinks"].grad.dtype == torch.float32


def test_layers_share_their_sequences():
    ends = torch.from_numpy(linearize(build_tree(random_chat(3))).visible_end)[None]
    x = torch.empty(1, 2, ends.shape[1], 8)
    call = Call(x, x, x, ends, 1.0, None, None, None, None)
    assert varlen._sequences_of(call) is varlen._sequences_of(call)


def test_nothing_to_attend():
    x = torch.zeros(2, 3, 0, 8)
    out, lse = varlen_tree_attention(x, x, x, torch.zeros(2, 0, dtype=torch.int32), scale=1.0)
    assert (out.shape, lse.shape) == ((2, 3, 0, 8), (2, 3, 0))


def test_windows_need_steps_along_the_pass():
    case = make_case(Shape())
    positions = case.options["positions"] * 2
    with pytest.raises(ValueError, match=r"positions of row 0 don't go up by one.*impl='flex'"):
        varlen_tree_attention(
            **case.inputs, visible_end=case.visible_end, scale=1.0, positions=positions, window=4
        )


def test_padding_of_the_collator_has_positions_for_windows():
    rows = [linearize(build_tree(random_chat(turns))) for turns in (1, 3)]
    batch = OnePassCollator(pad_to_multiple_of=300)(rows)
    chains = chains_of(batch["visible_end"].numpy(), batch["position_ids"].int().numpy())
    assert chains.queries.size == batch["input_ids"].numel()


def test_gradients_that_the_kernels_do_not_have_are_errors():
    case = make_case(Shape())
    q = case.inputs["q"].clone().requires_grad_()
    inputs = {**case.inputs, "q": q, "visible_end": case.visible_end, "scale": 1.0}
    with flash_attention_on_cpu():
        out, lse = varlen_tree_attention(**inputs)
        with pytest.raises(RuntimeError, match=r"no gradient through lse: use impl='flex'"):
            lse.sum().backward()
        out, _ = varlen_tree_attention(**inputs)
        [grad] = torch.autograd.grad((out**2).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):  # not twice
            torch.autograd.grad(grad.sum(), q)


class OnAnAmpere:
    """Tensors that say they are on a CUDA device, to try what is chosen there."""

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))

    def call(d_qk=64, d_v=64, dtype=torch.bfloat16, softcap=None, ends=None, positions=None):
        ends = torch.tensor([[4, 2, 4, 4]], dtype=torch.int32) if ends is None else ends
        q = OnAnAmpere(1, 2, ends.shape[1], d_qk, dtype=dtype)
        v = OnAnAmpere(1, 2, ends.shape[1], d_v, dtype=dtype)
        window = None if positions is None else 5
        return Call(q, q, v, ends, 1.0, positions, window, softcap, None)

    return call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype=torch.float32), r"q is torch\.float32, expected torch\.bfloat16 or"),
        (dict(d_qk=320, d_v=320), r"head sizes go up to 256, got 320 and 320"),
        (dict(d_qk=64, d_v=128), r"d_v is 128, expected at most d_qk, 64"),
        (dict(softcap=2.0), r"it has no softcap and got 2\.0"),
    ],
)
def test_what_the_kernels_cannot_do_goes_to_flex(ampere, options, message):
    call = ampere(**options)
    assert registry.choose("auto", call).name == "flex"
    with pytest.raises(ValueError, match=message + r".*use impl='flex'"):
        registry.choose("varlen", call)


def test_auto_takes_it_for_what_it_can_do(ampere, monkeypatch):
    assert registry.choose("auto", ampere()).name == "varlen"
    steps = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
    assert registry.choose("auto", ampere(positions=steps)).name == "varlen"
    assert registry.choose("auto", ampere(positions=steps * 2)).name == "flex"
    branches = torch.tensor([[40, *range(2, 41)]], dtype=torch.int32)
    assert registry.choose("auto", ampere(ends=branches)).name == "varlen"
    monkeypatch.setattr(varlen, "MAX_KEYS_PER_TOKEN", 1)
    assert registry.choose("auto", ampere(ends=branches)).name == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert registry.choose("auto", ampere()).name == "flex"
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0"):
        registry.choose("varlen", ampere())


def test_a_cpu_has_no_such_kernels():
    case = make_case(Shape())
    with pytest.raises(ValueError, match=r"impl='varlen' and q is on cpu"):
        tree_attention(**case.inputs, visible_end=case.visible_end, impl="varlen")
