"""Runs of a training script in several processes of this machine, over gloo."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from tests.training.sharding import ENVIRONMENT, SHARDED

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.training.image_worker", "tests.setsft.distributed_worker"])

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
    """Run a worker in several processes of one thread each, as torchrun would.

    They are forked from a process that has imported what they need, which takes most of the time
    of a short run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(num_processes)
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    environment |= dict(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    with patch.dict(os.environ, OMP_NUM_THREADS="1", **ENVIRONMENT):
        ensure_running()
    with tempfile.TemporaryFile() as said:
        processes = []
        for rank in map(str, range(num_processes)):
            own = environment | dict(RANK=rank, LOCAL_RANK=rank)
            what = (worker, arguments, own, DupFd(said.fileno()))
            process = _SERVER.Process(target=_work, args=what)
            process.start()
            processes.append(process)
        running = processes
        while running:
            wait([process.sentinel for process in running])
            if any(process.exitcode for process in processes):  # the others would wait for it
                for process in processes:
                    process.kill()
            running = [process for process in running if process.exitcode is None]
        said.seek(0)
        text = said.read().decode(errors="replace")
    assert not any(process.exitcode for process in processes), text[-8000:]


def _work(worker: str, arguments: Sequence[str], environment: dict[str, str], said: Any) -> None:
    """Be a process of a run; what it says goes to a file."""
    number = said.detach()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(number, stream.fileno())
    faulthandler.enable()
    os.environ.update(environment)
    sys.argv = [worker, *arguments]
    runpy.run_module(worker, run_name="__main__")
