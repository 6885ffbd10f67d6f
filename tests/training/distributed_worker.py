"""Trains two steps of SGD on four conversations and saves the losses and the weights; started by
test_distributed.py.

torchrun --nproc-per-node 2 -m tests.training.distributed_worker FOLDER JSON_OPTIONS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer
from onepass_trl.versions import checkpointing_option
from tests.conversations import as_record
from tests.model_coverage import make_tiny_model
from tests.models import MODELS, make_model
from tests.n_pass import SGD
from tests.training.conversations import WITH_ROLLOUTS
from tests.training.sharding import shard_on_cpu


def main(folder: str, options: dict) -> None:
    start(options)
    train_and_save(make_trainer(folder, options), folder)


def make_trainer(folder: str, options: dict) -> OnePassSFTTrainer:
    """Return a trainer of a tiny model on the conversations."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    settings = dict(
        output_dir=folder,
        max_length=None,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        dataloader_pin_memory=False,
        **SGD,
    )
    settings[checkpointing_option()] = False
    rows = Dataset.from_list([as_record(passes) for passes in WITH_ROLLOUTS])
    evaluate = options.pop("evaluate", False)
    return OnePassSFTTrainer(
        make_model_of(options.pop("model", "qwen3")),
        OnePassSFTConfig(**{**settings, **options}),
        train_dataset=rows,
        eval_dataset=rows.select(range(3)) if evaluate else None,
        processing_class=tokenizer,
    )


def make_model_of(name: str) -> PreTrainedModel:
    """Return a tiny model of `tests.models`, or a multimodal one of this type."""
    if name in MODELS:
        return make_model(name)
    return make_tiny_model(name, AutoModelForImageTextToText)


def start(options: dict) -> None:
    """Set up this process, for the options of its trainer."""
    torch.set_num_threads(1)
    if not options.get("use_cpu", True):
        shard_on_cpu(deepspeed="deepspeed" in options)
    if cp_size := options.pop("cp_size", None):
        num_processes = int(os.environ["WORLD_SIZE"])
        options["parallelism_config"] = ParallelismConfig(
            cp_size=cp_size, dp_shard_size=num_processes // cp_size
        )


def train_and_save(trainer: OnePassSFTTrainer, folder: str) -> None:
    """Train, save history and weights, and end this process."""
    args, used = trainer.args, trainer.accelerator.distributed_type
    if used != ("DEEPSPEED" if args.deepspeed else "FSDP" if args.fsdp else "MULTI_CPU"):
        raise AssertionError(f"{args.deepspeed=} and {args.fsdp=}, but it would train with {used}")
    cp_size = trainer.get_cp_size()

    def check_pieces(_module, _args, kwargs):
        if kwargs.get("visible_end") is None:
            return  # a pass of N passes, by which the model is verified
        rows, pieces = kwargs["visible_end"].shape, kwargs["input_ids"].shape
        if rows[1] != pieces[1] * cp_size:
            raise AssertionError(f"pieces of {pieces} of rows of {rows}")

    trainer.model.model.register_forward_pre_hook(check_pieces, with_kwargs=True)
    trainer.train()
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model(f"{folder}/model")
    if trainer.accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        history[-1] |= evaluation
        Path(folder, "history.json").write_text(json.dumps(history))
    leave()


def leave() -> None:
    """End this process once all have come here, without Python's clean-up.

    Threads of gloo may still hold what that takes apart, such as DDP's reducer: the process would
    wait for them, or abort.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
