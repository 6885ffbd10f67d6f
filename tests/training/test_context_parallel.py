"""Rows in pieces on several processes (`cp_size`): what the model computes, and what is refused.

Whole training runs with it are in test_distributed.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from onepass_trl.attention.context_parallel import ContextParallel
from onepass_trl.training.context_parallel import check_context_parallel
from tests.models import make_model
from tests.training.test_distributed import launch

# All that a tiny model of them has is tested: groups of 2 and 4 processes, 4 heads, 2 key heads.
KINDS = {"llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_moe"}


@pytest.mark.slow
def test_pieces_compute_what_whole_rows_compute(tmp_path):
    results = tmp_path / "results.json"
    launch(4, "tests.training.context_parallel_worker", str(results))
    results = json.loads(results.read_text())
    assert results.keys() >= KINDS
    for name, differences in results.items():
        for group in differences:
            assert group["is_top1"] == 0, name
            assert max(group["log_probs"], group["entropy"]) <= 1e-6, (name, group)
            assert group["gradient"] <= 1e-5, (name, group)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 3), (3, 3, 4), (6, 2, 4), (2, 1, 4), (12, 3, 2)]
)
def test_heads_that_cannot_be_shared_out_are_an_error(heads, kv_heads, size):
    group = SimpleNamespace(rank=lambda: 0, size=lambda: size)
    pieces = ContextParallel(group, position_ids=torch.arange(12)[None])
    query, key = torch.zeros(1, heads, 3, 8), torch.zeros(1, kv_heads, 3, 8)
    message = f"LlamaAttention has {heads} query and {kv_heads} key heads, which {size} processes"
    with pytest.raises(ValueError, match=message):
        pieces.to_whole_rows("LlamaAttention", query, key, key)


def make_options(**changed):
    options = dict(
        average_tokens_across_devices=True,
        accelerator_config=SimpleNamespace(dispatch_batches=None),
        neftune_noise_alpha=None,
    )
    return SimpleNamespace(**{**options, **changed})


def test_layers_that_carry_state_are_refused():
    with pytest.raises(ValueError, match=r"carries state along the row in model\.layers\.0"):
        check_context_parallel(make_model("qwen3_5"), make_options(), has_aux_loss=False)


def test_an_auxiliary_loss_is_refused():
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.0"):
        check_context_parallel(make_model("qwen3_moe"), make_options(), has_aux_loss=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(average_tokens_across_devices=False), "Leave it at True"),
        (
            dict(accelerator_config=SimpleNamespace(dispatch_batches=True)),
            "dispatch_batches gives every process other rows",
        ),
        (dict(neftune_noise_alpha=5.0), "neftune_noise_alpha scales noise by the length of a row"),
    ],
)
def test_options_that_count_rows_or_batches_otherwise_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        check_context_parallel(make_model("qwen3"), make_options(**changed), has_aux_loss=False)
