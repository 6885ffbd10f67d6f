"""mamba-ssm's scan of Mamba 2 along trees, against the recurrence itself in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from tests.attention.rows import chat_row
from tests.hybrids_fla.mamba import make_case
from tests.hybrids_fla.test_rules import TOLERANCE, offloaded, packed, random_rows

SMALL = chat_row(2, 3, 8)
CASES = {
    "random": dict(visible_end=random_rows(seed=2, batch=2, seq=20)),
    "packed": dict(visible_end=packed(SMALL, torch.full((1, 20), 20, dtype=torch.int32), SMALL)),
    "gated": dict(visible_end=SMALL, gated=True, heads=4, groups=2),
    "limits": dict(visible_end=SMALL, limit=(0.1, 0.5)),
    "chunks": dict(visible_end=torch.full((1, 70), 70, dtype=torch.int32), chunk_size=32),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_scan_along_a_tree_is_the_recurrence(options):
    case = make_case(**options)
    assert max(case.errors(case.out(*case.leaves)).values()) < TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_and_offloaded_it_computes_the_same(use_reentrant):
    case = make_case(SMALL)
    expected = torch.autograd.grad(case.out(*case.leaves), case.leaves, case.dout)
    with offloaded():
        out = checkpoint(case.out, *case.leaves, use_reentrant=use_reentrant)
    out.backward(case.dout)
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_a_tree_launches_what_a_sequence_does(monkeypatch):
    """Kernels are counted and not run."""
    launched = []
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "run", lambda kernel, *_, **__: launched.append(kernel)
    )
    case = make_case(chat_row(8, 3, 8))

    def launches(run):
        launched.clear()
        run(*case.leaves).sum().backward()
        return len(launched)

    assert launches(case.out) == launches(case.rule.plain) > 10
