"""Runs of a training script in several processes of this machine, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.training.sharding import ENVIRONMENT, SHARDED

REPOSITORY = Path(__file__).parents[1]
FSDP2 = dict(
    **SHARDED,
    fsdp=True,
    fsdp_config=dict(
        version=2,
        reshard_after_forward=True,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_layer_cls_to_wrap=["Qwen3DecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    ),
)


def zero(stage: int) -> dict:
    """Return the options of DeepSpeed ZeRO."""
    sharding = dict(stage=stage)
    if stage == 3:  # by default it keeps parameters as small as all of these whole
        sharding |= dict(
            stage3_param_persistence_threshold=0, stage3_gather_16bit_weights_on_model_save=True
        )
    automatic = (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return dict(
        **SHARDED,
        deepspeed=dict(
            zero_optimization=sharding,
            zero_allow_untested_optimizer=True,
            **dict.fromkeys(automatic, "auto"),
        ),
    )


def run(
    folder: Path, num_processes: int, worker="tests.training.distributed_worker", **options
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Return the logged history and the weights of a worker's training run."""
    folder.mkdir()
    use_cpu = str(options.get("use_cpu", True)).lower()
    launch(num_processes, worker, str(folder), json.dumps(options), ACCELERATE_USE_CPU=use_cpu)
    history = json.loads((folder / "history.json").read_text())
    [weights] = (folder / "model").glob("*model.safetensors")  # or of adapters
    return history, load_file(weights)


def launch(num_processes: int, worker: str, *arguments: str, **environment: str) -> None:
    """Run a worker in several processes of one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_processes),
        "--master-port",
        str(port),
    ]
    command = [sys.executable, *launcher, "-m", worker, *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    environment = {**os.environ, **ENVIRONMENT, **own, **environment}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    # What the processes said, before the launcher's own lines about them.
    own = result.stderr.partition("torch/distributed/elastic/multiprocessing")[0] or result.stderr
    assert result.returncode == 0, own[-8000:]
