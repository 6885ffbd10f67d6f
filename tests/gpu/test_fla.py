"""Linear attention along trees by fla's kernels, in bfloat16 against N-pass by the same kernels.

The dry run, part of `make test-fla`, is in float32 in Triton's interpreter, with smaller trees.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from onepass_trl.attention.branching import fla_rule
from onepass_trl.attention.branching.segments import segments_of
from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.attention.cases import error, tree_positions
from tests.attention.rows import chat_row
from tests.hybrids_fla.cases import GATED, KIMI, Case, make_case
from tests.models import make_model

from .device import BF16, DEVICE, DRY_RUN

pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
if DRY_RUN:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("fla's kernels run on a GPU", allow_module_level=True)
    import tests.hybrids_fla.interpreter  # noqa: F401 (before kernels of fla are imported)

if DRY_RUN:
    DTYPE, SIZES = torch.float32, dict(heads=1, key_dim=16, value_dim=16)
    TREES = {"chat": chat_row(2, 3, 10)}
else:
    DTYPE, SIZES = BF16, dict(heads=4, key_dim=128, value_dim=128)
    TREES = {
        "chat": chat_row(6, 20, 150),
        "rows": torch.cat([chat_row(3, 40, 41, seed) for seed in range(2)]),
        "short": chat_row(12, 1, 12),
    }


def make(name: str, tree: str) -> Case:
    return make_case(name, TREES[tree].to(DEVICE), dtype=DTYPE, **SIZES)


def n_pass(case: Case) -> Tensor:
    """Return the outputs, each from a call of the rule for a path of the tree that ends in it.

    Where passes share a token, the output of the first is taken: all give the same.
    """
    backend = fla_rule.usable_backend()
    parents = segments_of(case.visible_end).token_parents
    with_children = set(parents.tolist())
    flat = [x.flatten(0, 1) for x in case.leaves]
    out: dict[int, Tensor] = {}
    for leaf in range(len(parents)):
        if leaf in with_children:
            continue
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(int(parents[path[-1]]))
        path.reverse()
        one_pass, _ = backend.RULES[case.name](
            *(x[path][None] for x in flat), use_qk_l2norm_in_kernel=True
        )
        out = dict(zip(path, one_pass[0], strict=True)) | out
    return torch.stack([out[token] for token in range(len(parents))]).view_as(case.dout)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", [GATED, KIMI])
def test_a_tree_errs_little_more_than_n_passes(name, tree):
    case = make(name, tree)
    actual, expected = case.errors(case.out(*case.leaves)), case.errors(n_pass(case))
    for result, of_n_pass in expected.items():
        assert actual[result] <= 2 * of_n_pass + 1e-6, (result, actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_and_offloaded_it_computes_the_same(use_reentrant):
    case = make(GATED, "chat")
    expected = torch.autograd.grad(case.out(*case.leaves), case.leaves, case.dout)
    with torch.autograd.graph.save_on_cpu(pin_memory=not DRY_RUN):
        out = checkpoint(case.out, *case.leaves, use_reentrant=use_reentrant)
    out.backward(case.dout)
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        assert error(leaf.grad, gradient) < 1e-3


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
    model = make_model(name, **sizes[name]).to(DEVICE, DTYPE)
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
