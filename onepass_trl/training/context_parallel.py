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

from onepass_trl.attention.head_exchange import ContextParallel
from onepass_trl.attention.model_check import base_model
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.training.config import OnePassSFTConfig


def adapt_accelerator(accelerator: Accelerator) -> None:
    """Keep accelerate from what is wrong for processes that share a batch."""
    # Its own context parallelism is a ring of plain causal attention: preparing a model for it
    # refuses models with windows, and drops masks.
    assert hasattr(accelerator, "_prepare_cp"), "accelerate prepares models elsewhere now"
    accelerator._prepare_cp = lambda *objects: objects
    # Dispatching gives every process other rows. It is accelerate's default for a dataset that is
    # an IterableDataset.
    accelerator.dataloader_config.dispatch_batches = False
    accelerator.gather_for_metrics = partial(_gather_for_metrics, accelerator)


def _gather_for_metrics(
    accelerator: Accelerator, tensor: Tensor, use_gather_object: bool = False
) -> Tensor:
    """Gather one copy of each sample, in the order of the batches.

    accelerate's own takes copies for different samples: it would drop some of the last batch, and
    keep all copies of the others.
    """
    del use_gather_object  # these are the losses of an evaluation, nothing else is computed
    copies = accelerator.parallelism_config.non_data_parallel_size
    gathered = accelerator.gather(tensor)
    entries = gathered.unflatten(0, (-1, copies, len(tensor)))[:, 0].flatten(0, 1)
    state = accelerator.gradient_state
    if state.end_of_dataloader and state.remainder > 0:
        return entries[: state.remainder]
    return entries


def check_context_parallel(args: OnePassSFTConfig) -> None:
    """Raise ValueError for options that pieces of rows can't be trained with."""
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


def gather_router_logits(model: nn.Module) -> None:
    """Make a mixture of experts return the router logits of whole rows. Harmless to repeat.

    Its auxiliary loss is a product of means over tokens, which pieces don't add up to.
    """
    backbone = base_model(model).base_model  # of which TRL's fused head takes them
    if _whole_router_logits not in backbone._forward_hooks.values():
        backbone.register_forward_pre_hook(_withhold_mask, with_kwargs=True)
        backbone.register_forward_hook(_whole_router_logits, with_kwargs=True)


def _withhold_mask(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Leave the mask to the auxiliary loss: its length isn't that of the pieces."""
    if kwargs.get("context_parallel") is None:
        return None
    return args, {**kwargs, "attention_mask": None}


def _whole_router_logits(
    _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Any:
    pieces: ContextParallel | None = kwargs.get("context_parallel")
    if pieces is None or getattr(outputs, "router_logits", None) is None:
        return None
    batch = len(pieces.position_ids)
    by_row = torch.stack(outputs.router_logits, dim=-1).unflatten(0, (batch, -1))
    whole = _WholeRows.apply(by_row, 1, pieces.group)
    outputs.router_logits = whole.flatten(0, 1).unbind(-1)
    return outputs


def forward_in_pieces(
    model: nn.Module, group: dist.ProcessGroup, inputs: dict[str, Any], **kwargs: Any
) -> Any:
    """Return the outputs of a fused LM head for whole rows; each process computes its piece.

    Args:
        group: the processes, all with the same inputs.
        inputs: ``input_ids``, ``position_ids``, ``shift_labels``, ``visible_end`` and, for an
            auxiliary loss, ``attention_mask``, each ``(batch, seq)``; and what isn't a tensor.

    Raises:
        ValueError: the inputs of the processes are not the same, or have images.
    """
    if "pixel_values" in inputs:
        raise ValueError(
            "the batch has images, and cp_size > 1 divides rows of text only: set cp_size to 1, or "
            "remove the images"
        )
    _check_same_batch(inputs["input_ids"], group)
    batch, seq = inputs["input_ids"].shape
    padding = -seq % group.size()
    ends = inputs["visible_end"].new_full((batch, padding), seq + padding)  # a tree of its own
    visible_end = torch.cat([inputs["visible_end"], ends], dim=1)
    steps = torch.arange(padding, device=ends.device).expand(batch, -1)
    position_ids = torch.cat([inputs["position_ids"], steps], dim=1)
    pieces = ContextParallel(group, position_ids)
    own = {
        name: pieces.own_piece(pad(inputs[name], (0, padding), value=fill))
        for name, fill in (("input_ids", 0), ("shift_labels", IGNORE_INDEX))
    }
    own["position_ids"] = pieces.own_piece(position_ids)
    # Of whole rows: what attention sees, and what the auxiliary loss counts.
    own["visible_end"] = visible_end
    if "attention_mask" in inputs:
        own["attention_mask"] = pad(inputs["attention_mask"], (0, padding))
    outputs = model(**{**inputs, **own}, context_parallel=pieces, **kwargs)
    per_token = torch.stack(
        [outputs.log_probs, outputs.entropy.detach(), outputs.is_top1.to(outputs.log_probs)]
    )
    log_probs, entropy, is_top1 = _WholeRows.apply(per_token, 2, group)[..., :seq]
    return replace(
        outputs,
        loss=None,
        label_mask=None,
        log_probs=log_probs,
        entropy=entropy.detach(),
        is_top1=is_top1.bool(),
    )


def _check_same_batch(input_ids: Tensor, group: dist.ProcessGroup) -> None:
    """Raise before the exchange would put pieces of different rows together."""
    flat = input_ids.flatten()
    places = torch.arange(1, len(flat) + 1, device=flat.device)
    own = torch.stack([places[-1], (flat * places).sum()])
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    if (torch.stack(every) != own).any():
        raise ValueError(
            "the processes that share a row (cp_size) got different batches, of "
            f"{', '.join(str(int(one[0])) for one in every)} tokens: use the trainer's data "
            "loaders, or prepare yours with trainer.accelerator.prepare"
        )


class _WholeRows(torch.autograd.Function):
    """Puts the pieces of all processes together along a dimension.

    Every process computes the same loss from them, so each has the whole gradient at hand and
    takes its piece of it. Data parallelism averages over all processes, also over these, of which
    each has a part of the parameters' gradient: hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, piece: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        piece = piece.contiguous()
        pieces = [torch.empty_like(piece) for _ in range(group.size())]
        dist.all_gather(pieces, piece, group=group)
        return torch.cat(pieces, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        size = ctx.group.size()
        return gradients[0].chunk(size, ctx.dim)[ctx.group.rank()] * size, None, None
