"""Trains two steps of SGD on conversations with images and saves the losses and the weights, or
the error if each process has one conversation, with and without images; started by test_images.py.

torchrun --nproc-per-node 2 -m tests.training.image_worker FOLDER JSON_OPTIONS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.images import make_processor
from tests.n_pass import SGD
from tests.training.distributed_worker import leave, start, train_and_save
from tests.training.test_images import (
    CONVERSATIONS,
    TEXT_ONLY,
    as_record,
    make_trainer,
    trained_model,
)


def main(folder: str, options: dict) -> None:
    start(options)
    name = options.pop("name")
    is_mixed = options.pop("is_mixed", False)
    model = {key: options.pop(key) for key in ("tied", "adapters") if key in options}
    trainer = make_trainer(
        trained_model(name, **model),
        make_processor(name),
        [as_record(x) for x in ([CONVERSATIONS[0], TEXT_ONLY] if is_mixed else CONVERSATIONS)],
        Path(folder),
        max_steps=2,
        save_strategy="no",
        dataloader_pin_memory=False,
        **SGD,
        **options,
    )
    if is_mixed:
        with pytest.raises(ValueError) as found:
            trainer.train()
        Path(folder, f"{trainer.args.process_index}.txt").write_text(str(found.value))
        leave()
    train_and_save(trainer, folder)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
