"""Batches in pieces: each process of a group computes the same rows, and of them its piece.

What a training step does with a batch stays as it is. The model gets a piece of it, and its outputs
per token are put together again, so that every process of the group has those of whole rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import pad

from onepass_trl.attention.context_parallel import ContextParallel
from onepass_trl.attention.model_check import state_layers
from onepass_trl.data.layout import IGNORE_INDEX
from onepass_trl.training.config import OnePassSFTConfig


def adapt_accelerator(accelerator: Accelerator) -> None:
    """Keep accelerate from what is wrong for processes that share a batch."""
    # Its own context parallelism is a ring of plain causal attention: preparing a model for it
    # refuses models with windows, and drops masks.
    accelerator._prepare_cp = lambda *objects: objects
    # Dispatching gives every process other rows. It is accelerate's default for a dataset that is
    # an IterableDataset.
    accelerator.dataloader_config.dispatch_batches = False
    accelerator.gather_for_metrics = partial(_gather_for_metrics, accelerator)


def _gather_for_metrics(
    accelerator: Accelerator, tensor: Tensor, use_gather_object: bool = False
) -> Tensor:
    """Return the entries of all processes, one set for each batch, and of each sample only one.

    accelerate's own takes the entries of all processes for those of different samples: of the last
    batch it would drop some, and keep all duplicates of the others.
    """
    del use_gather_object  # these are the losses of an evaluation, nothing else is computed
    copies = accelerator.parallelism_config.non_data_parallel_size
    gathered = accelerator.gather(tensor)
    entries = gathered.unflatten(0, (-1, copies, len(tensor)))[:, 0].flatten(0, 1)
    state = accelerator.gradient_state
    if state.end_of_dataloader and state.remainder > 0:
        return entries[: state.remainder]
    return entries


def check_context_parallel(model: nn.Module, args: OnePassSFTConfig, *, has_aux_loss: bool) -> None:
    """Raise ValueError if a model can't be trained on pieces of rows, or not with these options."""
    if layers := state_layers(model):
        raise ValueError(
            f"cp_size is above 1, but {type(model).__name__} carries state along the row in "
            f"{layers[0]} and {len(layers) - 1} more layers: the processes would have to wait for "
            "one another. Set cp_size to 1"
        )
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
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "dispatch_batches gives every process other rows, and with cp_size above 1 several "
            "share a batch. Leave it unset"
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            "cp_size is above 1, but neftune_noise_alpha scales noise by the length of a row, and "
            "a process has a piece. Set it to None, or cp_size to 1"
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
    # A few tokens at most, each a subtree of its own.
    ends = torch.arange(seq + 1, seq + padding + 1).to(inputs["visible_end"])
    visible_end = torch.cat([inputs["visible_end"], ends.expand(batch, -1)], dim=1)
    pieces = ContextParallel(group, pad(inputs["position_ids"], (0, padding)))
    own = {
        name: pieces.own_piece(pad(inputs[name], (0, padding), value=fill))
        for name, fill in (("input_ids", 0), ("position_ids", 0), ("shift_labels", IGNORE_INDEX))
    }
    own["visible_end"] = visible_end  # of whole rows: attention sees them
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
