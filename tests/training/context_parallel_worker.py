"""Compares a batch computed in pieces with the whole batch, for every kind of attention; started
by test_context_parallel.py.

torchrun --nproc-per-node 4 -m tests.training.context_parallel_worker FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from onepass_trl import OnePassCollator, build_tree, linearize
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.training.context_parallel import forward_in_pieces, gather_router_logits
from onepass_trl.training.lm_head import add_fused_lm_head
from tests.conversations import forked_rollouts, random_chat
from tests.models import MODELS, make_model
from tests.training.distributed_worker import leave

OPTIONS = dict(use_cache=False, fused_lm_head=True)


def main(file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = [pairs[dist.get_rank() // 2], dist.group.WORLD]
    results = {name: [compare(name, group) for group in groups] for name in MODELS}
    different = {"input_ids": torch.zeros(1, 8 + dist.get_rank(), dtype=torch.int64)}
    with pytest.raises(ValueError, match="got different batches, of 8, 9, 10, 11 tokens"):
        forward_in_pieces(torch.nn.Identity(), dist.group.WORLD, different)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(results))
    leave()


def compare(name: str, group: dist.ProcessGroup) -> dict[str, float]:
    """Return the largest differences, relative to the largest value."""
    model = make_model(name)
    use_onepass_attention(model)
    add_fused_lm_head(model)
    gather_router_logits(model)
    has_aux_loss = hasattr(model.config, "router_aux_loss_coef")
    # A row of 64 tokens and a shorter one; then one row whose length is odd.
    rows = [linearize(build_tree(passes)) for passes in (random_chat(4), forked_rollouts(3))]
    worst: dict[str, float] = {}
    for batch in (OnePassCollator()(rows), OnePassCollator()([rows[0]])):
        inputs = {
            key: batch[key] for key in ("input_ids", "position_ids", "shift_labels", "visible_end")
        }
        if has_aux_loss:
            inputs |= {"attention_mask": batch["multiplicity"], "output_router_logits": True}
        whole = model(**inputs, **OPTIONS)
        expected = gradients(model, whole, batch["weights"])
        pieces = forward_in_pieces(model, group, inputs, **OPTIONS)
        actual = gradients(model, pieces, batch["weights"])
        for gradient in actual.values():  # as data parallelism does
            dist.all_reduce(gradient, group=group)
            gradient /= group.size()
        outputs = ["log_probs", "entropy", "is_top1"]
        if isinstance(whole.aux_loss, torch.Tensor):  # Granite has none before transformers 5.18
            outputs.append("aux_loss")
        pairs = {key: (getattr(pieces, key), getattr(whole, key)) for key in outputs}
        for key, (one, other) in {**pairs, **{k: (actual[k], expected[k]) for k in actual}}.items():
            difference = (
                one.float() - other.float()
            ).abs().max() / other.float().abs().max().clamp(1e-9)
            kind = key if key in outputs else "gradient"
            worst[kind] = max(worst.get(kind, 0.0), difference.item())
    return worst


def gradients(model, outputs, weights) -> dict[str, torch.Tensor]:
    """Return those of a loss that isn't the same for all tokens, and of the auxiliary loss."""
    model.zero_grad()
    loss = (outputs.log_probs * weights * outputs.log_probs.detach().exp().add(0.5)).mean()
    (loss if outputs.aux_loss is None else loss + outputs.aux_loss).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


if __name__ == "__main__":
    main(sys.argv[1])
