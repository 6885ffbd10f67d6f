"""Mamba 2 along trees by mamba-ssm's kernels, in bfloat16 against N-pass by the same kernels.

The dry run, part of `make test-fla`, is in float32 in Triton's interpreter, with smaller trees.
"""

from __future__ import annotations

import pytest
import torch

from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.hybrids_fla.cases import Case
from tests.models import make_model

from .device import DEVICE, DRY_RUN
from .hybrids import (
    DTYPE,
    TREES,
    assert_checkpointed_and_offloaded_the_same,
    assert_errs_little_more_than_n_passes,
    assert_gives_what_it_gives_for_each_path,
)

mamba = pytest.importorskip(
    "tests.hybrids_fla.mamba", reason="mamba-ssm is not installed", exc_type=ImportError
)

if DRY_RUN:
    SIZES = dict(heads=2, groups=1, head_dim=8, state_size=16, chunk_size=16)
else:  # Nemotron-H's, with fewer heads
    SIZES = dict(heads=16, groups=2, head_dim=64, state_size=128, chunk_size=128)


def make(tree: str) -> Case:
    return mamba.make_case(TREES[tree].to(DEVICE), dtype=DTYPE, **SIZES)


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_errs_little_more_than_n_passes(tree):
    assert_errs_little_more_than_n_passes(make(tree))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_and_offloaded_it_computes_the_same(use_reentrant):
    assert_checkpointed_and_offloaded_the_same(make("chat"), use_reentrant=use_reentrant)


def test_tensors_on_the_cpu_are_refused_before_triton_is_asked(gpu):
    model = make_model("bamba")
    use_onepass_attention(model)
    ids = torch.full_like(TREES["chat"], 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got tensors on the CPU, .*has kernels for GPUs only"):
        model(ids, visible_end=TREES["chat"], use_cache=False)


# `make test-fla` compares the others with N-pass.
@pytest.mark.parametrize(
    "name", ["bamba"] if DRY_RUN else ["nemotron_h", "granitemoehybrid", "falcon_h1", "bamba"]
)
def test_a_model_gives_what_it_gives_for_each_path(name):
    assert_gives_what_it_gives_for_each_path(make_model(name))
