"""Rows in pieces on several processes (`cp_size`): what the model computes, and what is refused.

Whole training runs with it are in test_distributed.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from onepass_trl.attention.head_exchange import ContextParallel
from onepass_trl.training.context_parallel import check_context_parallel
from tests.launching import launch
from tests.models import MODELS


@pytest.mark.long("onepass_trl", "tests/training", "tests/launching.py")
def test_pieces_compute_what_whole_rows_compute(tmp_path):
    """In groups of 2 and 4 processes; the models have 4 heads and 2 key heads."""
    results = tmp_path / "results.json"
    launch(4, "tests.training.context_parallel_worker", str(results))
    results = json.loads(results.read_text())
    assert results.keys() == MODELS.keys()
    assert {"qwen3_moe", "gpt_oss"} <= {name for name in results if "aux_loss" in results[name][0]}
    for name, differences in results.items():
        for group in differences:
            assert group["is_top1"] == 0, name
            for output in ("log_probs", "entropy", "aux_loss"):
                assert group.get(output, 0) <= 1e-6, (name, group)
            assert group["gradient"] <= 1e-5, (name, group)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 3), (3, 3, 4), (6, 2, 4), (2, 1, 4), (12, 3, 2)]
)
def test_heads_that_cannot_be_shared_out_are_an_error(heads, kv_heads, size):
    group = SimpleNamespace(rank=lambda: 0, size=lambda: size)
    pieces = ContextParallel(group, position_ids=torch.arange(12)[None])
    query, key = torch.zeros(1, 3, heads, 8), torch.zeros(1, 3, kv_heads, 8)
    message = f"LlamaAttention has {heads}, {kv_heads}, {kv_heads} heads, which {size} processes"
    with pytest.raises(ValueError, match=message):
        pieces.to_whole_rows("LlamaAttention", query, key, key)


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
    options = dict(
        average_tokens_across_devices=True,
        accelerator_config=SimpleNamespace(dispatch_batches=None),
        neftune_noise_alpha=None,
    )
    check_context_parallel(SimpleNamespace(**options))
    with pytest.raises(ValueError, match=message):
        check_context_parallel(SimpleNamespace(**{**options, **changed}))
