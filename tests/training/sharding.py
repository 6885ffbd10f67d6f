"""FSDP and DeepSpeed over processes of a CPU.

accelerate has both for accelerators only: told to use the CPU, it trains with DDP and says nothing.
So it is not told, and gets a process group over gloo that is already made.

As a module it is `onepass_trl.cli.sft` in such processes, and says last what they trained with:

accelerate launch --config_file FILE -m tests.training.sharding FLAGS
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from onepass_trl.cli.sft import train

# Of the trainer's arguments: take the process group that is there.
SHARDED = dict(use_cpu=False, accelerator_config=dict(use_configured_state=True))
# Of the processes, where there may be a GPU after all.
ENVIRONMENT = dict(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"
)


def shard_on_cpu(*, deepspeed: bool) -> None:
    """Make the process group, for DeepSpeed or for FSDP."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(deepspeed).lower()
    state = PartialState(backend="gloo")
    if not deepspeed:
        state.distributed_type = DistributedType.MULTI_GPU  # which FSDP replaces by its own


if __name__ == "__main__":
    shard_on_cpu(deepspeed=os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    status = train(sys.argv[1:])
    # In one write: two processes share the output.
    print(f"{AcceleratorState().distributed_type.value}\n", end="")
    raise SystemExit(status)
