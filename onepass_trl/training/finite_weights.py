"""Weights that aren't finite are not saved: the loss of the next step would have shown them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FiniteWeights(TrainerCallback):
    """Raises FloatingPointError before weights are saved that a NaN gradient has reached."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the weights if they are saved now, or the training ends."""
        if model is not None and (control.should_save or control.should_training_stop):
            check_weights(model, state.global_step)

    on_epoch_end = on_step_end


@torch.no_grad()
def check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError, in all processes, for trained weights that aren't finite."""
    finite = [_is_finite(x) for x in model.parameters() if x.requires_grad]
    if not finite:
        return
    all_finite = torch.stack([x.to(finite[0].device) for x in finite]).all()
    if not gather(all_finite[None]).all():
        raise FloatingPointError(
            f"the weights aren't finite after step {step}, since a gradient was NaN or infinite; "
            "they are not saved. Resume from an earlier checkpoint with a lower learning_rate, or "
            "set max_grad_norm"
        )


def _is_finite(weight: nn.Parameter) -> torch.Tensor:
    """Return whether what this process holds of a weight is finite; all of it with ZeRO-3.

    DeepSpeed's pieces are filled up with any values, so the weight is put together.
    """
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.isfinite().all()
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.isfinite().all()
