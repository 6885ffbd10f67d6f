"""Tree attention by torch's variable-length kernels, whose place eager ones take on a CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given

from onepass_trl import build_tree, linearize
from onepass_trl.attention import varlen
from onepass_trl.attention.reference import dense_tree_attention
from onepass_trl.attention.varlen import chains_of, varlen_tree_attention
from onepass_trl.data.layout import concatenate
from onepass_trl.visibility import dense_mask
from tests.attention.cases import Shape, error, make_case
from tests.attention.flash import flash_attention_on_cpu
from tests.conversations import forked_rollouts, random_chat
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
    num_copies = int((row.num_passes == 0).sum())
    assert len(lengths) == len(passes) + num_copies
    assert lengths.max() == len(passes[-1])
    assert chains.keys.size == sum(map(len, passes)) + sum(
        row.position_ids[row.num_passes == 0] + 1
    )
    assert chains.keys_per_token == chains.keys.size / len(row)


def test_an_empty_row_has_no_chain():
    assert chains_of(np.zeros((2, 0), dtype=np.int32)).query_ends.size == 0


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


@pytest.mark.parametrize("passes", [random_chat(3), forked_rollouts(3)])
def test_layers_share_their_sequences(passes):
    row = linearize(build_tree(passes))
    ends = torch.from_numpy(row.visible_end)[None]
    x = torch.randn(1, 2, len(row), 8, dtype=torch.float64)
    assert varlen._sequences_of(ends, None) is varlen._sequences_of(ends, None)
    with flash_attention_on_cpu():
        out, _ = varlen_tree_attention(x, x, x, ends, scale=1.0)
    expected, _ = dense_tree_attention(x, x, x, ends, scale=1.0)
    assert error(out, expected) < 1e-12


def test_nothing_to_attend():
    x = torch.zeros(2, 3, 0, 8)
    out, lse = varlen_tree_attention(x, x, x, torch.zeros(2, 0, dtype=torch.int32), scale=1.0)
    assert (out.shape, lse.shape) == ((2, 3, 0, 8), (2, 3, 0))


def test_what_the_kernels_cannot_do_is_an_error():
    case = make_case(Shape())
    inputs = dict(case.inputs, visible_end=case.visible_end, scale=1.0)
    with pytest.raises(ValueError, match=r"has no softcap and got 2\.0"):
        varlen_tree_attention(**inputs, softcap=2.0)
    positions = case.options["positions"] * 2
    with pytest.raises(ValueError, match=r"positions of row 0 don't go up by one.*impl='flex'"):
        varlen_tree_attention(**inputs, positions=positions, window=4)
    q = case.inputs["q"].clone().requires_grad_()
    with flash_attention_on_cpu():
        out, _ = varlen_tree_attention(**{**inputs, "q": q})
        [grad] = torch.autograd.grad((out**2).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):  # not twice
            torch.autograd.grad(grad.sum(), q)
