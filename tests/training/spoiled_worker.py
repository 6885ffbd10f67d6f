"""Trains what isn't saved: a step after which one process has a weight that is NaN, or a model that
ignores the tree; started by test_distributed.py.

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

from tests.training.distributed_worker import leave, make_trainer, start
from tests.training.test_first_check import ignores_positions


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
    spoiled = options.pop("spoiled")
    trainer = make_trainer(folder, options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if spoiled == "weight":
            trainer.add_callback(Spoil())
        else:
            ignores_positions(monkeypatch, trainer.model)
        with pytest.raises((FloatingPointError, ValueError)) as found:
            trainer.train()
    Path(folder, f"{trainer.args.process_index}.txt").write_text(str(found.value))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
