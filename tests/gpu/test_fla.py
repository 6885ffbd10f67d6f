"""Linear attention along trees by fla's kernels, in bfloat16 against N-pass by the same kernels.

The dry run, part of `make test-fla`, is in float32 in Triton's interpreter, with smaller trees.
"""

from __future__ import annotations

import pytest
import torch

from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.hybrids_fla.cases import GATED, KIMI, Case, make_case
from tests.models import make_model

from .device import DEVICE, DRY_RUN
from .hybrids import (
    DTYPE,
    TREES,
    assert_checkpointed_and_offloaded_the_same,
    assert_errs_little_more_than_n_passes,
    assert_gives_what_it_gives_for_each_path,
)

pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)

if DRY_RUN:
    SIZES = dict(heads=1, key_dim=16, value_dim=16)
else:
    SIZES = dict(heads=4, key_dim=128, value_dim=128)


def make(name: str, tree: str) -> Case:
    return make_case(name, TREES[tree].to(DEVICE), dtype=DTYPE, **SIZES)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", [GATED, KIMI])
def test_a_tree_errs_little_more_than_n_passes(name, tree):
    assert_errs_little_more_than_n_passes(make(name, tree))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_and_offloaded_it_computes_the_same(use_reentrant):
    assert_checkpointed_and_offloaded_the_same(make(GATED, "chat"), use_reentrant=use_reentrant)


def test_tensors_on_the_cpu_are_refused_before_triton_is_asked(gpu):
    model = make_model("qwen3_5")
    use_onepass_attention(model)
    ids = torch.full_like(TREES["chat"], 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got tensors on the CPU, .*has kernels for GPUs only"):
        model(ids, visible_end=TREES["chat"], use_cache=False)


# Kimi Linear takes half a minute in the interpreter.
@pytest.mark.parametrize("name", ["qwen3_5"] if DRY_RUN else ["qwen3_5", "kimi_linear"])
def test_a_model_gives_what_it_gives_for_each_path(name):
    width = 8 if DRY_RUN else 64
    heads = dict(linear_key_head_dim=width, linear_value_head_dim=width)
    sizes = {"qwen3_5": heads | dict(head_dim=16 if DRY_RUN else 64)}
    sizes["kimi_linear"] = dict(linear_head_dim=width)
    assert_gives_what_it_gives_for_each_path(make_model(name, **sizes[name]))
