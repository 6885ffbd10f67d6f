"""fla's delta rules along trees, against the recurrence itself in float64."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fla.backends import dispatch
from fla.ops.common import chunk_delta_h
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from onepass_trl.attention.branching import fla_backend, fla_rule, levels
from onepass_trl.attention.branching.segments import segments_of
from tests.attention.branching.costs import bytes_of_states
from tests.attention.cases import random_visible_end
from tests.attention.rows import chat_row
from tests.hybrids_fla.cases import GATED, KIMI, make_case

TOLERANCE = 1e-5


def random_rows(seed: int, batch: int, seq: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [random_visible_end(seq, generator) for _ in range(batch)]
    return torch.tensor(rows, dtype=torch.int32)


def packed(*rows: Tensor) -> Tensor:
    """Return one row of several, one after another."""
    offsets = [sum(row.shape[1] for row in rows[:index]) for index in range(len(rows))]
    return torch.cat([row + offset for row, offset in zip(rows, offsets, strict=True)], dim=1)


SMALL = chat_row(2, 3, 10)
LONG = torch.tensor([[90] * 4 + [82] * 78 + [90] * 8], dtype=torch.int32)  # a branch of two chunks
ROWS: dict[str, Tensor] = {
    "random": random_rows(seed=2, batch=2, seq=35),
    "packed": packed(SMALL, torch.full((1, 20), 20, dtype=torch.int32), SMALL),
    "causal": torch.full((1, 40), 40, dtype=torch.int32),
}


@pytest.fixture(autouse=True, params=[32])
def chunk_size(request, monkeypatch) -> int:
    """Small chunks, so that segments have several; fla takes 16 of the gated rule only."""
    monkeypatch.setattr(fla_rule, "CHUNK_SIZE", request.param)
    return request.param


@pytest.mark.parametrize(
    ("name", "chunk_size", "row"),
    [*((GATED, 16, row) for row in ROWS), (KIMI, 32, "random")],
    indirect=["chunk_size"],
)
def test_a_rule_along_a_tree_is_the_recurrence(name, chunk_size, row):
    case = make_case(name, ROWS[row], value_dim=8)
    assert max(case.errors(case.out(*case.leaves)).values()) < TOLERANCE


@pytest.mark.parametrize("name", [GATED, KIMI])
@pytest.mark.parametrize("chunk_size", [64], indirect=True)
def test_chunks_of_the_size_that_models_use(name, chunk_size):
    case = make_case(name, LONG, key_dim=24, value_dim=40)
    assert max(case.errors(case.out(*case.leaves)).values()) < TOLERANCE


def test_half_of_the_arguments_without_gradients():
    case = make_case(GATED, SMALL)
    leaves = [x if i % 2 else x.detach() for i, x in enumerate(case.leaves)]
    out = case.out(*leaves)
    gradients = torch.autograd.grad(out, leaves[1::2], case.dout)
    expected = case.expected[2::2]
    for actual, exact in zip(gradients, expected, strict=True):
        assert (actual.double() - exact).norm() < TOLERANCE * exact.norm()


def test_without_gradients():
    case = make_case(GATED, SMALL)
    with torch.no_grad():
        out = case.out(*case.leaves)
    with torch.inference_mode():
        assert torch.equal(case.out(*case.leaves), out)
    assert (out.double() - case.expected[0]).norm() < TOLERANCE * case.expected[0].norm()


def offloaded() -> torch.autograd.graph.saved_tensors_hooks:
    """Saved tensors come back as others, as from the CPU's memory."""
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)


@pytest.mark.parametrize("name", [GATED, KIMI])
def test_saved_tensors_may_be_offloaded(name):
    case = make_case(name, SMALL)
    with offloaded():
        out = case.out(*case.leaves)
    assert max(case.errors(out).values()) < TOLERANCE


@pytest.mark.parametrize(("use_reentrant", "hooks"), [(False, True), (True, False)])
def test_activation_checkpointing(use_reentrant, hooks):
    """Two layers, each computed again within the backward pass."""
    case = make_case(GATED, SMALL)

    def layers(run: Callable[..., Tensor]) -> Tensor:
        query, key, value, decay, rate = case.leaves
        value = run(query, key, value, decay, rate)
        return run(query, key, value, decay, rate)

    checkpointed = partial(checkpoint, case.out, use_reentrant=use_reentrant)
    expected = torch.autograd.grad(layers(case.out), case.leaves, case.dout)
    for leaf in case.leaves:
        leaf.grad = None
    if hooks:
        with offloaded():
            out = layers(checkpointed)
    else:
        out = layers(checkpointed)
    out.backward(case.dout)
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_a_plain_call_within_a_recomputation_is_not_taken_for_the_tree():
    """Checkpointing runs forwards between the beginning and the end of a backward pass."""
    case = make_case(GATED, SMALL)
    plain = []

    def layer(*leaves: Tensor) -> Tensor:
        out, _ = chunk_gated_delta_rule(*leaves, use_qk_l2norm_in_kernel=True, chunk_size=16)
        plain.append(out.detach())
        return case.out(*leaves) + 0 * out

    out = checkpoint(layer, *case.leaves, use_reentrant=False)
    assert max(case.errors(out).values()) < TOLERANCE
    assert len(plain) == 2
    assert torch.equal(*plain)


def test_it_is_not_differentiated_twice():
    case = make_case(GATED, SMALL)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        torch.autograd.grad(case.out(*case.leaves), case.leaves, case.dout, create_graph=True)


def test_gradients_may_be_asked_for_twice_and_shared_by_two_calls():
    case = make_case(GATED, SMALL)
    out = case.out(*case.leaves) + case.out(*case.leaves)  # both get the same tensor as gradient
    first = torch.autograd.grad(out, case.leaves, case.dout, retain_graph=True)
    second = torch.autograd.grad(out, case.leaves, case.dout)
    for actual, again, exact in zip(first, second, case.expected[1:], strict=True):
        assert torch.equal(actual, again)
        assert (actual.double() / 2 - exact).norm() < TOLERANCE * exact.norm()


def test_a_state_per_segment_is_kept(monkeypatch):
    """As docs/scaling.md counts them. Kernels are not run."""
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
    case = make_case(GATED, SMALL, value_dim=8)
    of_states = bytes_of_states(case.out, case.leaves, 2, 16, 8)
    assert of_states == 4 * len(segments_of(SMALL).begins) * 2 * 16 * 8


def test_layers_share_the_levels_of_a_batch(monkeypatch):
    case = make_case(GATED, SMALL.clone())
    made = []

    class Counted(levels.Levels):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(levels, "Levels", Counted)
    with torch.no_grad():
        for _ in range(2):
            case.out(*case.leaves)
    assert len(made) == 1


def test_a_call_after_an_error_is_not_taken_for_the_tree(monkeypatch):
    """The error leaves the backward pass between its beginning and its end."""
    case = make_case(GATED, SMALL)
    out = case.out(*case.leaves)

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(fla_backend, "_common", fail)
        with pytest.raises(MemoryError):
            torch.autograd.grad(out, case.leaves, case.dout)
        with pytest.raises(MemoryError):
            case.out(*case.leaves)
    options = dict(use_qk_l2norm_in_kernel=True, chunk_size=16)
    plain, _ = chunk_gated_delta_rule(*case.leaves, **options)
    actual = torch.autograd.grad(plain, case.leaves, case.dout)
    causal = make_case(GATED, torch.full_like(SMALL, SMALL.shape[1]))
    assert max(causal.errors(plain, actual).values()) < TOLERANCE


@pytest.mark.parametrize("function", ["fwd_h", "bwd_dhu"])
def test_a_state_that_has_not_followed_the_tree_is_an_error(monkeypatch, function):
    """As where another backend came first."""
    verifier = f"chunk_gated_delta_rule_{function}_verifier"
    monkeypatch.setattr(fla_backend.TreeBackend, verifier, lambda *_, **__: (False, None))
    case = make_case(GATED, SMALL)
    with pytest.raises(RuntimeError, match=f"has not called chunk_gated_delta_rule_{function}"):
        torch.autograd.grad(case.out(*case.leaves), case.leaves, case.dout)


FUNCTION, KERNEL = "chunk_gated_delta_rule_bwd_dhu", fla_backend._FORWARD_KERNEL
CHANGES = {
    "another signature": (FUNCTION, dispatch("common")(lambda k, w: None), r"takes \(k, w\)"),
    "no dispatch": (
        FUNCTION,
        inspect.unwrap(chunk_delta_h.chunk_gated_delta_rule_bwd_dhu),
        f"{FUNCTION} takes no backends .*FLA_DISABLE_BACKEND_DISPATCH=1",
    ),
    "another kernel": (KERNEL, SimpleNamespace(arg_names=["k", "h"]), rf"{KERNEL} takes \(k, h\)"),
    "no kernel": (KERNEL, None, f"{KERNEL} is missing"),
}


@pytest.mark.parametrize(("name", "changed", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_change_inside_fla_is_noticed(monkeypatch, name, changed, reason):
    assert fla_backend.difference() is None
    monkeypatch.setattr(chunk_delta_h, name, changed)
    assert re.search(reason, fla_backend.difference())
