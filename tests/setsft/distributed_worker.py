"""Trains two steps of SGD on four questions; started by test_distributed.py."""

from __future__ import annotations

import json
import sys

from tests.n_pass import SGD
from tests.setsft.trainers import forking_model, make_trainer
from tests.training.distributed_worker import start, train_and_save


def main(folder: str, options: dict) -> None:
    start(options)
    model, tokenizer = forking_model("qwen3")
    settings = {**SGD, "dataloader_pin_memory": False, **options}
    trainer = make_trainer(model, tokenizer, folder, **settings)
    train_and_save(trainer, folder)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
