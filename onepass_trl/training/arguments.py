"""What `OnePassSFTTrainer` is given, checked before anything is made of it."""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import fields
from typing import Any, TypeVar, cast

import pyarrow.compute as compute
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, TrainingArguments
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from onepass_trl.attention.image_models import sees_image_blocks, why_no_images
from onepass_trl.attention.implementations.base import WITHOUT_BLOCKS
from onepass_trl.attention.model_check import base_model, check_token_ids, text_model
from onepass_trl.chat.processing import (
    MissingTorchvisionError,
    ProcessingClass,
    load_processing_class,
)
from onepass_trl.data.collator import OnePassCollator
from onepass_trl.preparation.datasets import Maker, named_rows
from onepass_trl.preparation.options import NullArguments, PreparationOptions
from onepass_trl.training.config import OnePassSFTConfig, parallelism_of
from onepass_trl.training.response_templates import trl_response_template
from onepass_trl.versions import checkpointing_option

logger = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=OnePassSFTConfig)


def to_config(
    args: TrainingArguments | None, model: str | PreTrainedModel, kind: type[AnyConfig]
) -> AnyConfig:
    """Return `args` as a configuration of this kind, made from what it has of its options."""
    if isinstance(args, kind):
        return copy(args)  # some options are set: the caller's stay as they are
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return kind(f"{model_id.split('/')[-1]}-SFT")
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args must be a configuration such as {kind.__name__}(output_dir), got "
            f"{type(args).__name__}"
        )
    # Not by to_dict, which hides the values of eos_token, hub_token and the like.
    known = {field.name for field in fields(kind)}
    given = [field.name for field in fields(args) if field.init and field.name in known]
    return kind(**{name: getattr(args, name) for name in given})


def load_processing_class_of(
    model: str | PreTrainedModel, args: OnePassSFTConfig
) -> ProcessingClass:
    """Return the processor of a model, or its tokenizer if it has no processor.

    Raises:
        ValueError: the processor can't be made without torchvision.
    """
    try:
        return load_processing_class(
            model if isinstance(model, str) else get_config_model_id(model.config),
            revision=(args.model_init_kwargs or {}).get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    except MissingTorchvisionError as error:
        raise ValueError(
            f"{error}. Or pass the tokenizer as processing_class: checkpoints then lack the "
            "processor"
        ) from error


def config_of(model: str | PreTrainedModel, args: OnePassSFTConfig) -> PreTrainedConfig:
    """Return the configuration of a model, also of one inside a PEFT wrapper or not yet loaded."""
    if not isinstance(model, str):
        return base_model(model).config
    return AutoConfig.from_pretrained(
        model,
        revision=(args.model_init_kwargs or {}).get("revision"),
        trust_remote_code=args.trust_remote_code,
    )


def check_class(model: str, config: PreTrainedConfig) -> None:
    """Raise for a model whose class, of which SFTTrainer makes it, doesn't generate text."""
    for name in (config.architectures or ())[:1]:
        kind = getattr(transformers, name, None)  # None: of code that comes with the model
        if kind is not None and not kind.can_generate():
            raise ValueError(
                f"{model} is a {name}, which doesn't generate text: expected a causal language "
                "model, such as a Qwen3ForCausalLM, as its config.json names them"
            )


def check_dataset(name: str, dataset: Any) -> None:
    """Raise for a dataset of another kind, such as a list, and for one without a record."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        advice = "make one, with Dataset.from_list for instance"
        if isinstance(dataset, dict):
            advice = f"give one of {', '.join(map(repr, dataset))}, as dataset[..]"
        raise TypeError(
            f"the {name} dataset must be a datasets.Dataset or IterableDataset, got "
            f"{type(dataset).__name__}: {advice}"
        )
    if next(iter(dataset), None) is None:
        raise ValueError(f"the {name} dataset is empty: it needs at least one conversation")


def why_no_images_with(
    config: PreTrainedConfig, args: OnePassSFTConfig, cp_size: int | None = None
) -> str | None:
    """Return why a model can't be trained on images with these options, None if it can.

    Args:
        config: of the model.
        args: the options.
        cp_size: how many processes share a row; by default as `args` say.
    """
    if reason := why_no_images(config):
        return reason
    if cp_size is None:
        cp_size = getattr(parallelism_of(args), "cp_size", 1)
    if cp_size > 1:
        return (
            f"cp_size is {cp_size}, which divides rows of text only: set cp_size to 1, or remove "
            "the images"
        )
    if sees_image_blocks(config) and args.attention_impl in WITHOUT_BLOCKS:
        return (
            f"attention_impl={args.attention_impl!r} doesn't see them in both directions, as the "
            f"model does (model_type {config.model_type!r}): use attention_impl='auto', or remove "
            "the images"
        )
    return None


def preparation_options(args: OnePassSFTConfig, packing: bool) -> PreparationOptions:
    """Return how rows are made by this configuration.

    Raises:
        ValueError: if they are packed, but up to no length.
    """
    if packing and args.max_length is None:
        raise ValueError(
            "packing fills rows up to max_length, which is None: set max_length, or packing=False"
        )
    return PreparationOptions(
        max_length=args.max_length,
        overflow=args.overflow,
        train_on=args.trained_turns,
        packing=packing,
        invalid_turns=args.invalid_turns,
        null_arguments=cast(NullArguments, args.null_arguments),
        ignored_columns=tuple(args.ignored_columns or ()),
        chat_template_kwargs=args.template_arguments,
        verify_rendering=args.verify_rendering,
        num_proc=args.dataset_num_proc,
        shuffle_seed=args.seed if args.shuffle_dataset else None,
        text_field=args.dataset_text_field,
        completion_only_loss=args.completion_only_loss,
        known_templates=trl_response_template,
    )


def check_collator(collator: Any) -> None:
    """Raise unless a collator makes batches of rows; None is this package's own."""
    if collator is not None and not isinstance(collator, OnePassCollator):
        raise ValueError(
            f"data_collator must be an OnePassCollator, got {type(collator).__name__}: a batch "
            "needs visible_end, position_ids and shift_labels. Leave it unset to get the right one"
        )


def check_adapters(*configs: Any) -> None:
    """Raise for an adapter of PEFT that adds tokens to the row."""
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} puts virtual tokens before the row, which shifts every "
                "position of the tree. Use an adapter such as LoraConfig"
            )


def refuse_functions_of_logits(**arguments: Any) -> None:
    """Raise for an argument of SFTTrainer that has no meaning on trees."""
    reasons = {
        "compute_loss_func": "it gets logits and labels that are shifted along the row; override "
        "compute_loss of a subclass instead",
        "compute_metrics": "it gets logits and labels that are shifted along the row; use "
        "callbacks that generate, or the logged mean_token_accuracy and entropy",
        "preprocess_logits_for_metrics": "no logits are built",
    }
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"OnePassSFTTrainer can't honour {name}: {reasons[name]}")


def one_pass_model_kwargs(model_init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` with one-pass attention among them."""
    kwargs = dict(model_init_kwargs or {})
    asked = kwargs.get("attn_implementation")
    if asked not in (None, "onepass"):
        logger.warning(
            "attn_implementation=%r can't see a tree of turns: training with 'onepass' instead, "
            "which is chosen further by attention_impl. The saved model loads with any "
            "implementation.",
            asked,
        )
    return {**kwargs, "attn_implementation": "onepass"}


def looks_for_unused_parameters(args: OnePassSFTConfig, model: Any) -> None:
    """Set ``ddp_find_unused_parameters`` for a model whose encoders have no part in text.

    DDP would wait for their gradients. TRL 1.16 sets it too, but only with a processor.
    Reentrant checkpointing fails with it, so it stays as it is there.
    """
    base = base_model(model)
    reentrant = (getattr(args, f"{checkpointing_option()}_kwargs") or {}).get("use_reentrant")
    if args.ddp_find_unused_parameters is None and text_model(base) is not base and not reentrant:
        args.ddp_find_unused_parameters = True


# SFTTrainer leaves a dataset with such columns to a collator of its own, unprepared and unpacked.
_IMAGE_COLUMNS = {column: f"onepass_{column}" for column in ("image", "images")}


def with_hidden_images(dataset: Any) -> Any:
    """Return a dataset with names for the columns of images that SFTTrainer doesn't know."""
    return _renamed(dataset, _IMAGE_COLUMNS)


def with_shown_images(dataset: Any) -> Any:
    """Return a dataset with the usual names for the columns of images."""
    return _renamed(dataset, {hidden: column for column, hidden in _IMAGE_COLUMNS.items()})


def _renamed(dataset: Any, names: dict[str, str]) -> Any:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    given = set(get_dataset_column_names(dataset))
    names = {name: new for name, new in names.items() if name in given}
    return dataset.rename_columns(names) if names else dataset


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """Return the datasets that are given, and what to call them."""
    named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    given = [("train", train_dataset), *named.items()]
    return [(name, dataset) for name, dataset in given if dataset is not None]


def check_prepared(train_dataset: Any, eval_dataset: Any, maker: type[Maker]) -> None:
    """Raise unless all datasets consist of rows, as ``skip_prepare_dataset`` says.

    The rows of a stream are checked by the collator.
    """
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        columns = get_dataset_column_names(dataset)
        if missing := [column for column in maker.features if column not in columns]:
            raise ValueError(
                f"dataset_kwargs={{'skip_prepare_dataset': True}}, but the {name} dataset has the "
                f"columns {', '.join(columns)} and lacks {', '.join(missing)} of a prepared row: "
                "unset it, and the dataset is prepared"
            )
        if isinstance(dataset, Dataset):
            for rows, name_of in named_rows(dataset, maker.features, name):
                maker.check_rows(rows, name_of)


def check_images(name: str, dataset: Any, no_images: str | None) -> None:
    """Raise for prepared rows with images, if there is a reason why these can't be trained."""
    if no_images is None or not isinstance(dataset, Dataset):
        return
    if "image_spans" not in dataset.column_names:
        return
    spans = dataset.select_columns(["image_spans"]).with_format("arrow")[:]["image_spans"]
    if compute.max(compute.list_value_length(spans)).as_py():
        raise ValueError(f"the {name} dataset has images, but {no_images}")


def check_images_of_processes(has_images: bool, accelerator: Accelerator) -> None:
    """Raise, in all processes, if some have a batch with images and some have one without.

    Where weights are divided over the processes, those of the encoder are gathered by all or none.
    """
    own = torch.tensor([int(has_images)], device=accelerator.device)
    number = int(accelerator.gather(own).sum())
    if number not in (0, accelerator.num_processes):
        raise ValueError(
            f"the batches of {number} of {accelerator.num_processes} processes "
            "have images, and FSDP2 and ZeRO-3, which divide the encoder of images over the "
            "processes, need them in all or in none: train conversations with images and those "
            "without one after the other, give each batch an image by a larger "
            "per_device_train_batch_size, or use DDP"
        )


def check_vocabulary(name: str, dataset: Any, model: Any) -> None:
    """Raise for a token id, or a target, that the model has no embedding for."""
    if not isinstance(dataset, Dataset):
        return
    names = [column for column in ("input_ids", "shift_labels") if column in dataset.column_names]
    columns = dataset.select_columns(names).with_format("arrow")[:]
    for column in names:
        largest = compute.max(compute.list_flatten(columns[column])).as_py()
        check_token_ids(f"the {name} dataset", largest or 0, model)
