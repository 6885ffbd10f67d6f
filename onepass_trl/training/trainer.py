"""`OnePassSFTTrainer`: TRL's ``SFTTrainer``, one pass per conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from onepass_trl import versions
from onepass_trl.attention.image_models import collator_options, why_no_images
from onepass_trl.attention.model_check import base_model, check_rotary_embedding
from onepass_trl.attention.transformers_backend import check_model, use_onepass_attention
from onepass_trl.chat.processing import ProcessingClass, check_template_source
from onepass_trl.data.collator import ABOUT_ROWS, OnePassCollator, as_layout, model_inputs
from onepass_trl.data.layout import Layout
from onepass_trl.preparation.datasets import Maker, prepare_dataset
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import RowMaker
from onepass_trl.training import first_check
from onepass_trl.training.arguments import (
    check_adapters,
    check_class,
    check_collator,
    check_dataset,
    check_images,
    check_images_of_processes,
    check_prepared,
    check_vocabulary,
    config_of,
    load_processing_class_of,
    looks_for_unused_parameters,
    named_datasets,
    one_pass_model_kwargs,
    preparation_options,
    refuse_functions_of_logits,
    to_config,
    why_no_images_with,
    with_hidden_images,
    with_shown_images,
)
from onepass_trl.training.config import OnePassSFTConfig, check_parallelism
from onepass_trl.training.context_parallel import (
    adapt_accelerator,
    check_context_parallel,
    gather_router_logits,
)
from onepass_trl.training.finite_weights import FiniteWeights
from onepass_trl.training.freed_memory import keep_freed_memory
from onepass_trl.training.lm_head import add_fused_lm_head, check_sharded_head
from onepass_trl.training.loss import check_head, forward, target_losses
from onepass_trl.training.trl_advice import no_flash_attention_advice
from onepass_trl.vision import vision_of

AnyDataset: TypeAlias = "Dataset | IterableDataset"
# The totals of training and of an evaluation that are logged, and what else is added up with them.
_LOGGED_TOTALS = ("row_tokens", "npass_tokens", "trained_tokens", "turns")
_TOTALS = (*_LOGGED_TOTALS, "loss", "entropy", "top1")


class OnePassSFTTrainer(SFTTrainer):
    """Trains on multi-turn conversations in one pass each, with exactly the loss of N passes.

    A drop-in replacement for ``trl.SFTTrainer``: same arguments, same options (see
    `OnePassSFTConfig`), same callbacks, trackers, checkpoints and launchers. Saved checkpoints load
    in plain transformers.

    The loss is the mean negative log-likelihood of what the model generates (reasoning, answers,
    tool calls, the end of each turn), each turn in the context that inference gives it (arXiv
    2504.18246).

    Datasets have one conversation a record, in any of these forms:

    - ``messages``: a list of messages, with images for the models of
      `onepass_trl.attention.image_models`
    - ``prompt`` and ``completion``: lists of messages; the turns of the completion are trained
    - ``conversations``: ShareGPT's ``from`` / ``value`` messages
    - ``passes``: lists of ``{"input_ids": .., "labels": ..}``, any sequences that share prefixes
    - one sequence, trained as ``SFTTrainer`` does: ``text``, ``prompt`` and ``completion`` as text,
      or ``input_ids`` with ``labels`` or masks

    ``system`` (a prompt), ``tools`` and ``chat_template_kwargs`` may accompany them.

    Logged in addition to TRL's metrics, as totals since training began or was resumed:
    ``row_tokens``, ``npass_tokens`` (what N passes would have computed), ``npass_ratio`` (their
    quotient), ``trained_tokens`` and ``turns``.

    Args:
        model: a model id or path, a model, or a PEFT model, as for ``SFTTrainer``. Its attention
            must go through transformers' attention interface.
        args: `OnePassSFTConfig`; an ``SFTConfig`` or ``TrainingArguments`` is converted.
        data_collator: None, or an `OnePassCollator`.

    The other arguments are those of ``SFTTrainer``.

    Raises:
        ValueError: if the model, the dataset or an option can't be trained this way; the message
            says why and what to do instead.
    """

    _tag_names: tuple[str, ...] = ("trl", "sft", "onepass-trl")
    _name = "OnePassSFT"
    _paper = {  # noqa: RUF012 (TRL's own attribute)
        "title": "One-Pass to Reason: Token Duplication and Block-Sparse Mask for Efficient "
        "Fine-Tuning on Multi-Turn Reasoning",
        "id": "2504.18246",
    }

    _maker_type: type[Maker] = RowMaker
    """What makes the rows of a dataset's records."""

    @no_flash_attention_advice()
    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: OnePassCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, AnyDataset]
        | None = None,
        processing_class: ProcessingClass | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
    ) -> None:
        args = to_config(args, model, OnePassSFTConfig)
        refuse_functions_of_logits(
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_collator(data_collator)
        check_adapters(peft_config, *getattr(model, "peft_config", {}).values())
        if train_dataset is not None:  # else SFTTrainer says that it is missing
            check_dataset("train", train_dataset)
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            check_prepared(train_dataset, eval_dataset, self._maker_type)
        if isinstance(model, str):
            args.model_init_kwargs = one_pass_model_kwargs(args.model_init_kwargs)
        else:
            check_model(model)
            check_head(model)
        # TRL's flag would swap in a template with generation markers. Here the loss is on what the
        # assistant generates, always and token by token.
        args.assistant_only_loss = False

        if processing_class is None:
            processing_class = load_processing_class_of(model, args)
        check_template_source(args.chat_template_path, processing_class)

        config = config_of(model, args)
        if isinstance(model, str):
            check_class(model, config)
        self._why_no_images = why_no_images_with(config, args)
        packing = args.packing, args.eval_packing
        try:
            super().__init__(
                model=model,
                args=args,
                train_dataset=with_hidden_images(train_dataset),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        finally:
            args.packing, args.eval_packing = packing

        # The targets of a step are counted over all its batches, also for a model whose own loss
        # can't be given their number (Qwen3-VL, Gemma 4).
        self.model_accepts_loss_kwargs = True
        use_onepass_attention(self.model)
        check_head(self.model)
        if not versions.FUSED_LM_HEAD.installed:
            add_fused_lm_head(base_model(self.model))
        if self.is_fsdp_enabled:
            check_sharded_head(base_model(self.model))
        if not versions.ROUTER_AUX_LOSS_COEF.installed:
            self.router_aux_loss_coef = args.router_aux_loss_coef
        if self._context_parallel_group is not None:
            check_context_parallel(args)
            gather_router_logits(self.model)
        check_rotary_embedding(self.model, args.max_length)
        config = base_model(self.model).config
        # Again, as an accelerator may have been configured before the options.
        self._why_no_images = why_no_images_with(config, args, self.get_cp_size())
        for name, dataset in named_datasets(self.train_dataset, self.eval_dataset):
            check_vocabulary(name, dataset, self.model)
            check_images(name, dataset, self._why_no_images)
        self._of_images: dict[str, Any] = {
            "vision": None if why_no_images(config) else vision_of(self.processing_class),
            **collator_options(config),
        }
        zero = self.accelerator.deepspeed_plugin
        self._divides_encoder = self._of_images["vision"] is not None and (
            self.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3)
        )
        self.data_collator: Any = data_collator or OnePassCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            padding_free=self.padding_free,
            pad_to_multiple_of=args.pad_to_multiple_of,
            vocab_size=getattr(self.model.get_input_embeddings(), "num_embeddings", None),
            **self._of_images,
        )
        self.add_callback(FiniteWeights())
        if args.device.type == "cpu":
            keep_freed_memory()
        self._verifies_model = args.verify_model
        self._totals = {mode: dict.fromkeys(_TOTALS, 0.0) for mode in ("train", "eval")}

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and make it leave context parallelism to this trainer."""
        looks_for_unused_parameters(self.args, self.model)
        super().create_accelerator_and_postprocess()
        # Known to the options unless an accelerator was configured before them.
        check_parallelism(self.accelerator.parallelism_config)
        if self._context_parallel_group is not None:
            adapt_accelerator(self.accelerator)
            self.gather_function = self.accelerator.gather_for_metrics  # Trainer has kept the old
            # The datasets are packed by now. SFTTrainer would refuse it, for the masks that
            # accelerate's context parallelism drops; `__init__` puts this back.
            self.args.packing = self.args.eval_packing = False

    @property
    def _context_parallel_group(self) -> dist.ProcessGroup | None:
        """The processes that have the same batch and compute a piece of it each."""
        if self.get_cp_size() == 1:
            return None
        return self.accelerator.torch_device_mesh["cp"].get_group()

    def _prepare_context_parallel_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], AbstractContextManager[None]], dict[str, Any]]:
        return nullcontext, inputs  # `_forward` makes the pieces

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: ProcessingClass,
        args: OnePassSFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> AnyDataset:
        dataset = with_shown_images(dataset)
        check_dataset(dataset_name, dataset)
        options = preparation_options(args, packing)
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():
            column_names = get_dataset_column_names(dataset)
            if formatting_func is not None and "input_ids" not in column_names:
                dataset = dataset.map(
                    _formatted,
                    remove_columns=column_names,
                    fn_kwargs={"function": formatting_func, "text_field": args.dataset_text_field},
                )
                column_names = [args.dataset_text_field]
            maker = self._maker(processing_class, options)
            return prepare_dataset(dataset, column_names, maker, dataset_name)

    def _maker(self, processing_class: ProcessingClass, options: PreparationOptions) -> Maker:
        """Return what makes the rows of a dataset's records."""
        return RowMaker(processing_class, options, self._why_no_images)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self._maker_type.features)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | int | None:
        # A target that N-pass trains several times counts as often.
        counted = [_Counted(batch["weights"].sum(dtype=torch.int64)) for batch in batch_samples]
        return super()._get_num_items_in_batch(
            [{"labels": labels, "shift_labels": labels} for labels in counted], device
        )

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a step of TRL's; before the first one, the model is verified."""
        if self._verifies_model:
            self._verifies_model = False
            self._verify_model(model)
        return super().training_step(model, *args, **kwargs)

    def _verify_model(self, model: torch.nn.Module) -> None:
        first_check.verify(
            base_model(self.model),
            model,
            self._first_rows(),
            log_probs=lambda row: self._log_probs(model, row),
            accelerator=self.accelerator,
            vision=self._of_images["vision"],
        )

    def _first_rows(self) -> Iterator[Layout]:
        """Yield rows of the beginning of the dataset."""
        yield from map(as_layout, islice(self.train_dataset, first_check.NUM_ROWS))

    def _log_probs(self, model: torch.nn.Module, row: Layout) -> NDArray[np.float32]:
        """Return the log-probability of the target at each position of a row, ``(num_tokens,)``."""
        collator = OnePassCollator(
            pad_to_multiple_of=self.args.pad_to_multiple_of, **self._of_images
        )
        inputs: dict[str, Any] = model_inputs(self._prepare_inputs(collator([row])))
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = False
        return self._forward(model, inputs).log_probs[0, : len(row)].float().cpu().numpy()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the weighted mean loss of the targets (NLL or DFT), and record the metrics.

        Args:
            inputs: a batch of `OnePassCollator`.
            num_items_in_batch: sum of the target weights over all micro-batches and processes of
                the step; None for this batch's own.

        Raises:
            ValueError: if outputs are asked for: the fused LM head builds no logits. Or if only
                some processes have images, of which each has a piece of the encoder.
            FloatingPointError: if the loss is not finite.
        """
        if return_outputs:
            raise ValueError(
                "OnePassSFTTrainer computes no logits for metrics or predictions: labels don't "
                "follow one another along the row of a tree. Evaluate with "
                "prediction_loss_only=True, or generate"
            )
        if self._divides_encoder:
            check_images_of_processes("pixel_values" in inputs, self.accelerator)
        inputs = dict(inputs)
        weights, multiplicity, attention_mask, num_turns, row_lengths = (
            inputs.pop(key) for key in ABOUT_ROWS
        )
        counted = inputs.pop("counted_rows", None)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
            # The router statistics are means over tokens. Counting each as often as N passes would
            # see it makes them (and so the auxiliary loss) the ones of N passes; padding and fork
            # copies count nothing.
            inputs["attention_mask"] = multiplicity
        outputs = self._forward(model, inputs)

        weights = weights.to(outputs.log_probs.device)
        losses = target_losses(outputs.log_probs, weights, dft=self.args.loss_type == "dft")
        num_items = weights.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(num_items, device=losses.device).clamp(min=1)
        # As in SFTTrainer: `num_items_in_batch` counts the tokens of all processes and DDP averages
        # their gradients; the auxiliary loss is a mean per micro-batch.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self._processes_per_batch)
        aux_loss = loss.new_zeros(())
        if self.aux_loss_enabled:
            aux_loss = self._aux_loss(outputs)
            steps = (
                self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            )
            loss = loss + self.router_aux_loss_coef * aux_loss / steps

        # In the order of `_TOTALS`.
        per_token = (attention_mask, multiplicity, weights)
        per_target = (
            losses.detach(),
            outputs.entropy.detach() * weights,
            outputs.is_top1 * weights,
        )
        counted = self._num_counted(row_lengths.numel()) if counted is None else counted
        part = self._counted_part(counted, row_lengths)
        totals = [
            *(x[part].sum() for x in per_token),
            num_turns.flatten()[:counted].sum(),
            *(x[part].sum() for x in per_target),
        ]
        self._record(loss.detach(), aux_loss.detach(), torch.stack([x.float() for x in totals]))
        return loss

    def _aux_loss(self, outputs: Any) -> torch.Tensor:
        if isinstance(outputs.aux_loss, torch.Tensor):
            return outputs.aux_loss
        raise ValueError(
            f"{type(base_model(self.model)).__name__} returns no router logits, so it has no "
            f"auxiliary loss, and router_aux_loss_coef is {self.router_aux_loss_coef}: set it to "
            "0.0. Newer transformers may return them"
        )

    def _counted_part(self, counted: int, row_lengths: torch.Tensor) -> tuple[slice, ...]:
        """Return the part of a ``(batch, seq)`` tensor that the first `counted` rows are."""
        if counted == row_lengths.numel():
            return (slice(None),)
        if self.padding_free:
            return (slice(None), slice(int(row_lengths.flatten()[:counted].sum())))
        return (slice(counted),)

    def _num_counted(self, num_rows: int) -> int:
        """Return how many rows of this process's batch count in the metrics: all in training.

        accelerate pads the last batch of an evaluation with rows that were evaluated already. They
        come last and don't count.
        """
        state = self.accelerator.gradient_state
        last = state.end_of_dataloader and state.remainder > 0
        if self.model.training or not last:
            return num_rows
        before = self.accelerator.process_index // self._processes_per_batch * num_rows
        return min(max(state.remainder - before, 0), num_rows)

    @property
    def _processes_per_batch(self) -> int:
        return self.get_tp_size() * self.get_cp_size()

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        return forward(
            model,
            inputs,
            attention_impl=self.args.attention_impl,
            group=self._context_parallel_group,
        )

    def _record(self, loss: torch.Tensor, aux_loss: torch.Tensor, totals: torch.Tensor) -> None:
        """Gather the metrics of a batch over all processes, in one collective."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        local = torch.cat([torch.stack([loss.float(), aux_loss.float()]), totals])
        gathered = self.accelerator.gather(local[None]).double().cpu()
        self._check_finite("the loss", gathered[:, 0])
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(gathered[:, 1].mean().item())
        batch = dict(zip(_TOTALS, gathered[:, 2:].sum(dim=0).tolist(), strict=True))
        trained = max(batch["trained_tokens"], 1)
        metrics["entropy"].append(batch["entropy"] / trained)
        metrics["mean_token_accuracy"].append(batch["top1"] / trained)

        so_far = self._totals[mode]
        for name, value in batch.items():
            so_far[name] += value / self._processes_per_batch
        for name in _LOGGED_TOTALS:
            metrics[name] = [round(so_far[name])]
        metrics["npass_ratio"] = [so_far["npass_tokens"] / max(so_far["row_tokens"], 1)]
        self._total_train_tokens = round(self._totals["train"]["row_tokens"])
        metrics["num_tokens"] = [self._total_train_tokens]

    def _check_finite(self, what: str, of_processes: torch.Tensor) -> None:
        if of_processes.isfinite().all():
            return
        raise FloatingPointError(
            f"{what} is {of_processes.tolist()} (one value per process) at step "
            f"{self.state.global_step}: the weights or activations overflowed. Look for NaN in the "
            "model's weights, lower learning_rate, set max_grad_norm, or train in bf16 instead of "
            "fp16"
        )

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss of a batch, and neither logits nor labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, return_outputs=not prediction_loss_only)
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all targets, whatever the batches and processes.

        transformers' own is a mean of the batches' means. The auxiliary loss of a mixture of
        experts depends on what is in a batch and is logged as ``aux_loss`` only.
        """
        self._totals["eval"] = totals = dict.fromkeys(_TOTALS, 0.0)
        output = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=True,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        loss = totals["loss"] / max(totals["trained_tokens"], 1)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def predict(
        self,
        test_dataset: AnyDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Return the metrics of ``evaluate`` for `test_dataset`, and no predictions."""
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        rows = self._prepare_dataset(
            test_dataset,
            self.processing_class,
            self.args,
            packing,
            self._formatting_func,
            metric_key_prefix,
        )
        return super().predict(rows, ignore_keys, metric_key_prefix)


def _formatted(
    record: Mapping[str, Any], function: Callable[[Mapping[str, Any]], str], text_field: str
) -> dict[str, str]:
    text = function(record)
    if not isinstance(text, str):
        raise ValueError(
            f"formatting_func returned {type(text).__name__} for a record, expected its text. For "
            "conversations make a column 'messages' with Dataset.map, and leave it out"
        )
    return {text_field: text}


class _Counted:
    """Labels that ``Trainer`` counts by ``labels.ne(-100).sum()``, of which the sum is known."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number

    def ne(self, _: int) -> _Counted:
        return self

    def sum(self) -> torch.Tensor:
        return self._number
