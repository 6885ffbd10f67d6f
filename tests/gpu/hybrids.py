"""What layers that carry state have to show on a GPU, whoever's kernels compute them."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.attention.cases import error, tree_positions
from tests.attention.rows import chat_row
from tests.hybrids_fla.cases import Case

from .device import BF16, DEVICE, DRY_RUN

if DRY_RUN:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels of Triton run on a GPU", allow_module_level=True)
    import tests.hybrids_fla.interpreter  # noqa: F401 (before kernels are imported)

if DRY_RUN:
    DTYPE = torch.float32
    TREES = {"chat": chat_row(2, 3, 10)}
else:
    DTYPE = BF16
    TREES = {
        "chat": chat_row(6, 20, 150),
        "rows": torch.cat([chat_row(3, 40, 41, seed) for seed in range(2)]),
        "short": chat_row(12, 1, 12),
    }


def assert_errs_little_more_than_n_passes(case: Case) -> None:
    actual, expected = case.errors(case.out(*case.leaves)), case.errors(case.n_pass())
    for result, of_n_pass in expected.items():
        assert actual[result] <= 2 * of_n_pass + 1e-6, (result, actual, expected)


def assert_checkpointed_and_offloaded_the_same(case: Case, *, use_reentrant: bool) -> None:
    expected = torch.autograd.grad(case.out(*case.leaves), case.leaves, case.dout)
    with torch.autograd.graph.save_on_cpu(pin_memory=not DRY_RUN):
        out = checkpoint(case.out, *case.leaves, use_reentrant=use_reentrant)
    out.backward(case.dout)
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        assert error(leaf.grad, gradient) < 1e-3


def assert_gives_what_it_gives_for_each_path(model: nn.Module) -> None:
    """Compare logits on a tree with those of plain forwards of some of its paths."""
    model = model.to(DEVICE, DTYPE)
    visible_end = TREES["chat"].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, visible_end.shape, generator=generator).to(DEVICE)
    position_ids = tree_positions(TREES["chat"]).long().to(DEVICE)
    use_onepass_attention(model)
    tree = dict(position_ids=position_ids, visible_end=visible_end)
    if not DRY_RUN:
        tree["attention_impl"] = "dense"  # other kernels are not what is tested
    with torch.no_grad():
        logits = model(ids, use_cache=False, **tree).logits
        ends = TREES["chat"][0].tolist()
        for token in range(len(ends) - 1, 0, -len(ends) // 3):
            path = [key for key in range(token + 1) if token < ends[key]]
            alone = model(ids[:, path], use_cache=False).logits
            assert error(logits[:, token], alone[:, -1]) < 0.1
