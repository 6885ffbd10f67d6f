"""Batches in pieces: each process of a group computes the same rows, and of them its piece.

What a training step does with a batch stays as it is. The model gets a piece of it, and its outputs
per token are put together again, so that every process of the group has those of whole rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import pad

from onepass_trl.attention.context_parallel import ContextParallel
from onepass_trl.data.layout import IGNORE_INDEX
from onepass_trl.training.config import OnePassSFTConfig


def use_own_exchange(accelerator: Accelerator) -> None:
    """Keep accelerate from preparing a model for its own context parallelism.

    That is a ring of plain causal attention: it refuses models with windows, and drops masks.
    """
    accelerator._prepare_cp = lambda *objects: objects


def check_context_parallel(args: OnePassSFTConfig, *, has_aux_loss: bool) -> None:
    """Raise ValueError for options that pieces of rows can't be trained with."""
    if has_aux_loss:
        raise ValueError(
            "cp_size is above 1, but the auxiliary loss of a mixture of experts is made of means "
            "over whole rows, and a process has a piece. Set router_aux_loss_coef=0.0, or cp_size "
            "to 1"
        )
    if not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False averages over processes, and with cp_size above 1 "
            "several share a batch. Leave it at True"
        )


def forward_in_pieces(
    model: nn.Module, group: dist.ProcessGroup, inputs: dict[str, Any], **kwargs: Any
) -> Any:
    """Return the outputs of a fused LM head for whole rows; each process computes its piece.

    Args:
        model: a model with one-pass attention and TRL's fused LM head.
        group: the processes, all with the same inputs.
        inputs: ``input_ids``, ``position_ids``, ``shift_labels``, ``visible_end``, each ``(batch,
            seq)``, and what isn't a tensor.
        **kwargs: more arguments of the model.
    """
    batch, seq = inputs["input_ids"].shape
    padding = -seq % group.size()
    ends = inputs["visible_end"].new_full((batch, padding), seq + padding)  # a tree of its own
    visible_end = torch.cat([inputs["visible_end"], ends], dim=1)
    pieces = ContextParallel(group, pad(inputs["position_ids"], (0, padding)))
    own = {
        name: pieces.own_piece(pad(inputs[name], (0, padding), value=fill))
        for name, fill in (("input_ids", 0), ("position_ids", 0), ("shift_labels", IGNORE_INDEX))
    }
    own["visible_end"] = visible_end  # of whole rows, which is what attention sees
    outputs = model(**{**inputs, **own}, context_parallel=pieces, **kwargs)
    per_token = torch.stack(
        [outputs.log_probs, outputs.entropy.detach(), outputs.is_top1.to(outputs.log_probs)]
    )
    log_probs, entropy, is_top1 = _WholeRows.apply(per_token, group)[..., :seq]
    return replace(
        outputs,
        loss=None,
        label_mask=None,
        log_probs=log_probs,
        entropy=entropy.detach(),
        is_top1=is_top1.bool(),
    )


class _WholeRows(torch.autograd.Function):
    """Puts the pieces of all processes together along the last dimension.

    Every process computes the same loss from them, so each has the whole gradient at hand and
    takes its piece of it. Data parallelism averages over all processes, also over these, of which
    each has a part of the parameters' gradient: hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, piece: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(piece) for _ in range(group.size())]
        dist.all_gather(pieces, piece.contiguous(), group=group)
        return torch.cat(pieces, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        return gradients[0].chunk(size, dim=-1)[ctx.group.rank()] * size, None
