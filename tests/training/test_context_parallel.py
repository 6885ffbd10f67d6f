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
    for name, differences in results.items():
        for group in differences:
            assert group["is_top1"] == 0, name
            assert max(group["log_probs"], group["entropy"]) <= 1e-6, (name, group)
            assert group["gradient"] <= 1e-5, (name, group)


@pytest.mark.parametrize(("heads", "size"), [(4, 3), (3, 4), (6, 4)])
def test_heads_that_cannot_be_shared_out_are_an_error(heads, size):
    group = SimpleNamespace(rank=lambda: 0, size=lambda: size)
    pieces = ContextParallel(group, position_ids=torch.arange(12)[None])
    query = torch.zeros(1, 3, heads, 8)
    with pytest.raises(ValueError, match=f"LlamaAttention has {heads} heads, which {size} proc"):
        pieces.to_whole_rows("LlamaAttention", query, query, query)


OPTIONS = SimpleNamespace(average_tokens_across_devices=True)


def test_what_is_a_mean_over_whole_rows_or_batches_is_refused():
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.0"):
        check_context_parallel(OPTIONS, has_aux_loss=True)
    options = SimpleNamespace(average_tokens_across_devices=False)
    with pytest.raises(ValueError, match="Leave it at True"):
        check_context_parallel(options, has_aux_loss=False)
