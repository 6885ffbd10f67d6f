"""`OnePassSFTConfig`: TRL's ``SFTConfig`` and what one-pass training adds to it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args

import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments
from trl import SFTConfig

from onepass_trl.attention.implementations.registry import Impl
from onepass_trl.chat.turns import TrainOn
from onepass_trl.data import packing
from onepass_trl.preparation.options import NullArguments, parse_train_on

INVALID_POLICIES = ("error", "drop")


def option(default: Any, help_text: str, choices: Collection[str] = ()) -> Any:
    """Return the field of an option, with what the command line says of it."""
    limited = {"choices": list(choices)} if choices else {}
    return field(default=default, metadata={"help": help_text, **limited})


@dataclass
class OnePassSFTConfig(SFTConfig):
    """Configuration of `OnePassSFTTrainer`.

    Every option of ``trl.SFTConfig`` keeps its meaning; these are added.

    Parameters:
        max_length: longest row in tokens, and longest pass (context and completion of one turn).
            By default None, any length: TRL's default of 1,024 would cut away most of what agents
            are trained on. Packing needs it.
        bf16: as in TRL, but by default off on a CPU.
        train_on: which assistant turns of a conversation are trained: ``"all"``, ``"last"``, or a
            list of turn indices such as ``[0, 2]`` (as a string on the command line). A message
            with ``"train": false`` is never trained.
        overflow: what happens to a pass longer than ``max_length``: ``"truncate"`` (its first
            ``max_length`` tokens are kept, as in ``SFTTrainer``), ``"error"`` or ``"drop"``. What
            is lost is counted and reported. A conversation of which only the whole tree is too
            long loses nothing: it is split into several rows.
        invalid_turns: what happens to a turn, or a whole record, from which no exact pass can be
            made: ``"error"``, or ``"drop"``: it is left out, counted and reported. A turn that
            isn't parsed back right is left out only if ``verify_rendering`` is True, since
            otherwise most records aren't parsed.
        null_arguments: what a null among the arguments of a tool call is. An Arrow struct column
            gives every call the argument names of all calls, filled with nulls, and real nulls
            can't be told from those: ``"drop"`` removes them, ``"keep"`` keeps them, ``"error"``
            refuses them. ``"auto"`` keeps them in columns that hold JSON (where they are real) and
            is ``"error"`` elsewhere.
        ignored_columns: columns that are treated as if the dataset didn't have them. For those that
            change nothing and whose names say that they may, which are errors otherwise.
        chat_template_kwargs: further arguments of the chat template, such as ``{"enable_thinking":
            False}`` (as JSON on the command line), for all conversations; a record's own
            ``chat_template_kwargs`` come first.
        verify_rendering: whether what a turn trains the model to generate is parsed, as a server
            does it, and compared with the turn's message; a difference is an error. By default for
            the first 8 records of a dataset, ``True`` for every record, ``False`` for none. It
            needs a response template: the tokenizer's own, or TRL's for known chat templates.
        verify_model: whether a small row of the training set is computed in one pass and in N
            passes before the first step, with this run's model, adapters, dtype and devices. Unless
            they agree but for rounding, the run ends with an error.
        attention_impl: implementation of tree attention: ``"auto"``, ``"cuda"``, ``"cpu"``,
            ``"varlen"``, ``"flex"``, ``"flex_flash"`` or ``"dense"``. See
            `onepass_trl.tree_attention`.

    Raises:
        ValueError: for an option of ``SFTConfig`` that one-pass training can't honour.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]  # noqa: RUF012

    _LEAST: ClassVar[dict[str, float]] = {
        "max_steps": -1,  # none
        "num_train_epochs": 0,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "pad_to_multiple_of": 1,
        "dataset_num_proc": 1,
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "neftune_noise_alpha": 0,
        "router_aux_loss_coef": 0,
        "eval_delay": 0,
        "logging_steps": 0,
        "eval_steps": 0,
        "save_steps": 0,
    }
    """The least values of options. Some that are less would be taken for another value: clipping
    would be off, or nothing trained."""

    max_length: int | None = option(
        None, "Longest row in tokens; unset: any length. Packing needs it."
    )
    bf16: bool | None = option(None, "Train in bf16; by default wherever there is an accelerator.")
    train_on: str = option(
        "all", "Assistant turns to train: 'all', 'last' or a list such as '[0, 2]'."
    )
    overflow: str = option(
        "truncate",
        "What to do with a turn whose context and completion exceed `max_length`.",
        packing.OVERFLOW_POLICIES,
    )
    invalid_turns: str = option(
        "error",
        "What to do with a turn, or a record, from which no exact pass can be made.",
        INVALID_POLICIES,
    )
    null_arguments: str = option(
        "auto",
        "What a null among a tool call's arguments is: a value to 'keep', a filler to 'drop', an "
        "'error'. 'auto' keeps it in columns that hold JSON, else raises.",
        get_args(NullArguments),
    )
    ignored_columns: list[str] | None = option(
        None,
        "Columns to treat as if the dataset didn't have them, where an error names one that "
        "changes nothing.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."
    )
    verify_rendering: bool | None = option(
        None,
        "Parse what each turn generates and compare it with its message: for every record, for "
        "none, or by default for the first records.",
    )
    verify_model: bool = option(
        True, "Compare one pass with N passes on a row of the dataset before the first step."
    )
    attention_impl: str = option("auto", "Implementation of tree attention.", get_args(Impl))

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What ``chat_template_kwargs`` means; ``__post_init__`` has decoded it."""
        assert not isinstance(self.chat_template_kwargs, str)
        return self.chat_template_kwargs or {}

    @property
    def trained_turns(self) -> TrainOn:
        """What ``train_on`` means: ``"all"``, ``"last"`` or the list of turn indices."""
        return parse_train_on(self.train_on)

    def __post_init__(self) -> None:
        check_parallelism(parallelism_of(self))
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            # TRL's default of bf16 raises on a machine without an accelerator.
            self.bf16 = False
        super().__post_init__()
        if self.loss_type == "chunked_nll":  # type: ignore[has-type]
            # TRL's default before 1.15: the same loss, by a forward that would take ours' place.
            self.loss_type = "nll"
        if isinstance(self.ignored_columns, str):  # in a YAML file
            self.ignored_columns = [self.ignored_columns]
        self.train_on = json.dumps(parse_train_on(self.train_on)).strip('"')
        self._check_values()
        if self.device.type == "cpu":
            self._check_on_cpu()
        self._check_exactness()

    def _check_values(self) -> None:
        inherited = {column.name for column in fields(SFTConfig)}
        for own in (column for column in fields(self) if column.name not in inherited):
            choices = own.metadata.get("choices")
            if choices and (value := getattr(self, own.name)) not in choices:
                raise ValueError(f"{own.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.max_length is not None:
            packing.check_max_length(self.max_length)
        for name, least in self._LEAST.items():
            value = getattr(self, name, None)
            if isinstance(value, (int, float)) and not value >= least:  # so that NaN is refused
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.chat_template_kwargs is not None and not isinstance(
            self.chat_template_kwargs, dict
        ):
            raise ValueError(
                "chat_template_kwargs must be a dict, or JSON text of one such as "
                f"'{{\"enable_thinking\": false}}', got {self.chat_template_kwargs!r}"
            )

    def _check_on_cpu(self) -> None:
        if self.activation_offloading:
            raise ValueError(
                "activation_offloading moves activations from an accelerator to the CPU, so it "
                "needs an accelerator; this run uses the CPU. Set activation_offloading=False"
            )
        if self.attention_impl in ("flex", "flex_flash"):
            raise ValueError(
                f"attention_impl={self.attention_impl!r} can't train on a CPU: FlexAttention has "
                "no backward there. Use 'auto'"
            )
        if self.attention_impl == "varlen":
            raise ValueError(
                "attention_impl='varlen' can't train on a CPU: torch has variable-length attention "
                "for CUDA devices only. Use 'auto'"
            )
        if self.fp16:
            raise ValueError(
                "fp16=True needs an accelerator, which scales the loss; this run uses the CPU. Use "
                "bf16=True, or neither"
            )

    def _check_exactness(self) -> None:
        """Raise for options of TRL's with which turns wouldn't be trained as they are served."""
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r} cuts rows in the middle of a turn, so "
                'its tokens would lose their context. Use packing_strategy="bfd": conversations '
                "longer than max_length are split along their branches, nothing is cut"
            )
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} would train turns on a context that "
                'inference never sees. Use the default "keep_start", or overflow="drop" to leave '
                "long turns out"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} needs the full logits with "
                "labels shifted along the row, which a tree of turns doesn't have. Set "
                "label_smoothing_factor=0"
            )


def check_parallelism(parallelism: ParallelismConfig | None) -> None:
    """Raise for parallelism that replaces a model's attention."""
    if parallelism is not None and parallelism.sp_enabled:
        raise ValueError(
            f"sp_size is {parallelism.sp_size}: DeepSpeed's sequence parallelism has its own "
            "attention, which doesn't know trees. Set sp_size to 1, and use FSDP2 with cp_size "
            f"{parallelism.sp_size} for as many pieces"
        )


def parallelism_of(args: TrainingArguments) -> ParallelismConfig | None:
    """Return the parallelism of some options, or what ``accelerate launch`` was told.

    The `Accelerator` reads that only later.
    """
    if args.parallelism_config is not None:
        return args.parallelism_config
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    return ParallelismConfig()  # of environment variables
