"""A `SetSFTTrainer` on the small tokenizer and a tiny model."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from onepass_trl.setsft import SetSFTConfig, SetSFTTrainer, add_forking_tokens
from onepass_trl.versions import checkpointing_option
from tests.chat.tokenizers import small_tokenizer
from tests.models import make_model
from tests.setsft.sets import RECORDS

NUM_TOKENS = 5


def fresh_tokenizer(family: str = "qwen3") -> PreTrainedTokenizerBase:
    """Return a small tokenizer of one's own, to which forking tokens may be added."""
    return copy.deepcopy(small_tokenizer(family))


def forking_model(name: str, **overrides: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a tiny model and its tokenizer, both with forking tokens that differ."""
    tokenizer = fresh_tokenizer()
    model = make_model(name, vocab_size=len(tokenizer), **overrides)
    add_forking_tokens(model, tokenizer, NUM_TOKENS, noise=1.0)
    return model, tokenizer


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Any,
    records: Any = RECORDS,
    trainer_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> SetSFTTrainer:
    settings: dict[str, Any] = dict(
        output_dir=str(output_dir),
        num_forking_tokens=NUM_TOKENS,
        max_length=None,
        report_to="none",
        bf16=False,
        use_cpu=True,
        router_aux_loss_coef=0.0,
        logging_steps=1,
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
    )
    settings[checkpointing_option()] = False
    return SetSFTTrainer(
        model,
        SetSFTConfig(**{**settings, **options}),
        train_dataset=Dataset.from_list(records) if isinstance(records, list) else records,
        processing_class=tokenizer,
        **(trainer_kwargs or {}),
    )


def batch_of(trainer: SetSFTTrainer) -> dict[str, Any]:
    """Return all rows of the training set as one batch."""
    return trainer.data_collator(list(trainer.train_dataset))
