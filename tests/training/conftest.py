"""The trainer that the tests of options and of datasets make."""

import pytest
from datasets import Dataset

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer
from tests.models import make_model
from tests.training.conversations import RECORDS


@pytest.fixture
def train(tmp_path, tiny_tokenizer):
    """Make a trainer on random conversations; keyword arguments of the config or the trainer
    override."""

    def make(
        model=None, dataset=None, eval_dataset=None, args=None, trainer_kwargs=None, **options
    ):
        settings = dict(
            output_dir=str(tmp_path),
            report_to="none",
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
        )
        return OnePassSFTTrainer(
            model if model is not None else make_model("qwen3"),
            args or OnePassSFTConfig(**{**settings, **options}),
            train_dataset=Dataset.from_list(RECORDS) if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            **(trainer_kwargs or {}),
        )

    return make
