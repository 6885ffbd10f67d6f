"""Rows in pieces on several processes (`cp_size`): what the model computes, and what is refused.

Whole training runs with it are in test_distributed.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from onepass_trl.attention.context_parallel import ContextParallel
from onepass_trl.training.context_parallel import check_context_parallel
from tests.models import MODELS
from tests.training.test_distributed import launch


@pytest.mark.slow
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


@pytest.mark.parametrize(("heads", "size"), [(4, 3), (3, 4), (6, 4)])
def test_heads_that_cannot_be_shared_out_are_an_error(heads, size):
    group = SimpleNamespace(rank=lambda: 0, size=lambda: size)
    pieces = ContextParallel(group, position_ids=torch.arange(12)[None])
    query = torch.zeros(1, 3, heads, 8)
    with pytest.raises(ValueError, match=f"LlamaAttention has {heads} heads, which {size} proc"):
        pieces.to_whole_rows("LlamaAttention", query, query, query)


def test_a_mean_over_processes_is_refused():
    with pytest.raises(ValueError, match="Leave it at True"):
        check_context_parallel(SimpleNamespace(average_tokens_across_devices=False))
