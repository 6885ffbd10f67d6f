"""Trains a step after which one process has a weight that is NaN; started by test_distributed.py.

torchrun --nproc-per-node 2 -m tests.training.spoiled_worker FOLDER JSON_OPTIONS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.training.distributed_worker import make_trainer, start


class Spoil(TrainerCallback):
    """Makes a weight NaN in the last process, after the optimizer's step."""

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.process_index == args.world_size - 1:
            weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
            whole = getattr(weight, "ds_tensor", weight)  # of ZeRO-3: this process's piece
            local = whole.to_local() if isinstance(whole, DTensor) else whole
            local.view(-1)[0] = torch.nan


def main(folder: str, options: dict) -> None:
    start(options)
    trainer = make_trainer(folder, options)
    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError) as found:
        trainer.train()
    Path(folder, f"{trainer.args.process_index}.txt").write_text(str(found.value))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
