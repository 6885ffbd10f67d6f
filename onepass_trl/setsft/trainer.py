"""`SetSFTTrainer`: set supervised fine-tuning with forking tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from onepass_trl.chat.processing import ProcessingClass
from onepass_trl.data import Layout, build_tree, linearize, split_passes
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.setsft import matching
from onepass_trl.setsft.collator import SetCollator
from onepass_trl.setsft.config import SetSFTConfig
from onepass_trl.setsft.models import give_bias, load_model, read_template, with_trained_embeddings
from onepass_trl.setsft.preparation import SetMaker
from onepass_trl.setsft.rendering import ForkingTokens
from onepass_trl.setsft.tokens import add_forking_tokens
from onepass_trl.setsft.traces import TraceSet, from_row
from onepass_trl.training import OnePassSFTTrainer, first_check
from onepass_trl.training.arguments import load_processing_class_of, to_config
from onepass_trl.training.trainer import AnyDataset

# A matching forward may always have this many tokens.
MATCHING_TOKENS = 32_768

Costs = NDArray[np.float64]
Assignment = NDArray[np.int64]


class SetSFTTrainer(OnePassSFTTrainer):
    """Trains several reasoning traces per question, each after its own forking token.

    Set supervised fine-tuning (SSFT, arXiv 2510.05132): the loss of each trace j of a question
    after each of K forking tokens i is ``cost[i, j]``, from one forward without gradient over the
    tree {question -> forking token -> trace}. The traces get the tokens that make the total least,
    and are trained after them, in one pass over {question -> matched token -> trace}.

    The forking tokens are added to the tokenizer and to the model, which change in place, see
    `onepass_trl.setsft.add_forking_tokens`. With a `peft_config` their embeddings are trained too.
    Generate afterwards with the prompts of `onepass_trl.setsft.forking_prompts`.

    Datasets have one question a record:

    - ``prompt``: a list of messages that ends before the answer, or text
    - ``completions``: a list of assistant messages with reasoning, or of strings

    ``system``, ``tools`` and ``chat_template_kwargs`` may accompany them. ``max_length`` bounds
    each trace with its question. Where the matched traces of a question don't fit into one row of
    that length, they become several rows of the same batch.

    Logged in addition to the metrics of `OnePassSFTTrainer`, whose ``turns`` are traces here, as
    means: ``matched_cost`` (of a matched pair), ``matching_gap`` (how much less that is than in a
    random assignment), ``matching_time_share``; and for the run: ``matched_share_1`` to
    ``matched_share_K``, the share of traces that got each token, and ``assignment_entropy``, their
    entropy in nats.

    Args:
        model: a model id or path, or a model not yet wrapped by PEFT, unless it and its tokenizer
            have the forking tokens already.
        args: `SetSFTConfig`; another configuration of TRL or transformers is converted.
        data_collator: must be None: a batch is laid out once its traces are matched.
        train_dataset: the questions.
        eval_dataset: likewise; matched as in training.
        processing_class: the tokenizer or processor; None: the model's own.

    The other arguments are those of ``SFTTrainer``.

    Raises:
        ValueError: if the model, the dataset or an option can't be trained this way; the message
            says why and what to do instead.
    """

    _tag_names = ("trl", "sft", "ssft", "onepass-trl")
    _name = "SetSFT"
    _paper = {  # noqa: RUF012 (TRL's own attribute)
        "title": "Training Large Language Models to Reason in Parallel with Global Forking Tokens",
        "id": "2510.05132",
    }

    _maker_type = SetMaker

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Any = None,
        processing_class: ProcessingClass | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = to_config(args, model, SetSFTConfig)
        if data_collator is not None:
            raise ValueError(
                "data_collator can't be chosen: a batch of sets is laid out once its traces are "
                "matched. Leave it unset"
            )
        if processing_class is None:
            processing_class = load_processing_class_of(model, args)
        if isinstance(model, str):
            model = load_model(model, args, quantization_config)
            args.model_init_kwargs = quantization_config = None
        if args.chat_template_path is not None:
            # Load the template first: new tokens start from its thinking opener.
            processing_class.chat_template = read_template(args.chat_template_path)
        self._token_ids = add_forking_tokens(
            model,
            processing_class,
            args.num_forking_tokens,
            forking_token_format=args.forking_token_format,
            thinking_opener=args.thinking_opener,
            noise=args.forking_token_noise,
            seed=args.seed,
        )
        # Trainer sets them too, once the datasets are prepared.
        self.args, self.processing_class = args, processing_class
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            quantization_config=quantization_config,
            peft_config=with_trained_embeddings(peft_config, model, self._token_ids),
            **kwargs,
        )
        give_bias(self.model.get_output_embeddings())
        self._row_collator = self.data_collator
        self.data_collator: Any = SetCollator()
        self._matched = {mode: np.zeros(args.num_forking_tokens) for mode in ("train", "eval")}
        self._seconds = {"matching": 0.0, "step": 0.0}

    def forking_tokens(self) -> ForkingTokens:
        """Return the forking tokens, their ids and what they replace."""
        args = self.args
        return ForkingTokens.of(
            self.processing_class,
            args.num_forking_tokens,
            args.forking_token_format,
            args.thinking_opener,
        )

    def _maker(self, processing_class: ProcessingClass, options: PreparationOptions) -> SetMaker:
        return SetMaker(processing_class, options, self.forking_tokens(), self.args.excess_traces)

    def _first_rows(self) -> Iterator[Layout]:
        for row in islice(self.train_dataset, first_check.NUM_ROWS):
            for set_ in from_row(row):
                passes = set_.after(self._token_ids[: len(set_.traces)])
                yield linearize(build_tree(passes))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a step of TRL's, whose time is taken."""
        begin = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._seconds["step"] += time.perf_counter() - begin
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Match the traces of the batch, and return the mean loss of their trained tokens.

        Args:
            inputs: a batch of `SetCollator`.
            return_outputs: must be False, see `OnePassSFTTrainer`.
            num_items_in_batch: trained tokens over all micro-batches and processes of the step;
                None for this batch's own.
        """
        sets, num_sets = inputs["sets"], inputs["num_sets"]
        num_counted = sum(num_sets[: self._num_counted(len(num_sets))])
        assignments = self._match(model, sets, num_counted)
        rows: list[Layout] = []
        counted_rows = 0
        for number, (set_, assignment) in enumerate(zip(sets, assignments, strict=True), start=1):
            passes = set_.after([self._token_ids[token] for token in assignment])
            trees = (
                [build_tree(passes)]
                if self.args.max_length is None
                else split_passes(passes, self.args.max_length)
            )
            rows += [linearize(tree) for tree in trees]
            if number == num_counted:
                counted_rows = len(rows)
        batch = self._prepare_inputs(self._row_collator(rows))
        batch["counted_rows"] = counted_rows
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    def _match(
        self, model: torch.nn.Module, sets: Sequence[TraceSet], num_counted: int
    ) -> list[Assignment]:
        """Return the number of the forking token of each trace of each set.

        Those of the first `num_counted` sets are recorded.
        """
        num_tokens = len(self._token_ids)
        begin = self._time()
        costs: list[Costs] = []
        if self.args.matching == "hungarian":
            costs = self.matching_costs(model, sets)
            assignments = [
                # What isn't finite is reported by all processes together, when it is gathered.
                matching.match(matrix if np.isfinite(matrix).all() else np.zeros_like(matrix))
                for matrix in costs
            ]
        elif self.args.matching == "random":
            seed = (self.args.seed, self.state.global_step)
            assignments = [
                matching.match_at_random(num_tokens, len(set_.traces), (*seed, set_.index))
                for set_ in sets
            ]
        else:
            assignments = [matching.match_in_order(set_, num_tokens) for set_ in sets]
        if self.model.training:
            self._seconds["matching"] += self._time() - begin
        self._record_matching(costs[:num_counted], assignments[:num_counted])
        return assignments

    @torch.no_grad()
    def matching_costs(self, model: torch.nn.Module, sets: Sequence[TraceSet]) -> list[Costs]:
        """Return the cost matrix of each set, ``(K, num_traces)``.

        The model is in evaluation mode: a cost is the loss of a pair without dropout and noise.
        """
        num_tokens, args = len(self._token_ids), self.args
        forwards = list(
            matching.plan_costs(
                sets,
                self._token_ids,
                num_targets=args.matching_tokens,
                max_pairs=args.matching_batch,
                max_tokens=self._most_matching_tokens(sets),
            )
        )
        # Agree on the number before the first forward, or collectives would interleave.
        most_forwards = self._most_forwards(len(forwards))
        costs = [np.zeros((num_tokens, len(set_.traces))) for set_ in sets]
        was_training = model.training
        model.eval()
        try:
            for forward in forwards:
                log_probs = self._log_probs(model, forward.row)
                matching.add_costs(costs, forward, log_probs, args.matching_reduction)
            for _ in range(most_forwards - len(forwards)):
                # Processes that share a sharded model must all take part in each of its forwards.
                self._log_probs(model, forwards[-1].row)
        finally:
            model.train(was_training)
        return costs

    def _most_matching_tokens(self, sets: Sequence[TraceSet]) -> int | None:
        """Return how many tokens one forward of the matching may have; None for any number."""
        if self.args.matching_batch is not None:
            return None
        # Without gradient a token takes less memory than in training.
        in_training = sum(set_.num_row_tokens() for set_ in sets)
        return max(2 * in_training, self.args.max_length or 0, MATCHING_TOKENS)

    def _most_forwards(self, num_forwards: int) -> int:
        """Return the largest number of forwards that a process needs for its batch."""
        if self.accelerator.num_processes == 1:
            return num_forwards
        own = torch.tensor([num_forwards], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())

    def _record_matching(self, costs: list[Costs], assignments: list[Assignment]) -> None:
        """Gather the metrics of the batch's matching over all processes, in one collective."""
        mode = "train" if self.model.training else "eval"
        counts = np.zeros(len(self._token_ids))
        for tokens in assignments:
            np.add.at(counts, tokens, 1)
        matched = sum(
            matrix[tokens, np.arange(tokens.size)].sum()
            for matrix, tokens in zip(costs, assignments, strict=False)  # costs only if computed
        )
        at_random = sum(map(matching.random_cost, costs))
        own = torch.tensor([matched, at_random, *counts], dtype=torch.float32)
        gathered = self.accelerator.gather(own.to(self.accelerator.device)[None]).double().cpu()
        self._check_finite("the cost of matching", gathered[:, 0])
        total = gathered.sum(dim=0).numpy()
        metrics, num_traces = self._metrics[mode], total[2:].sum()
        if self.args.matching == "hungarian":
            metrics["matched_cost"].append(float(total[0] / num_traces))
            metrics["matching_gap"].append(float((total[1] - total[0]) / num_traces))
        self._matched[mode] += total[2:]
        shares = self._matched[mode] / self._matched[mode].sum()
        for number, share in enumerate(shares, start=1):
            metrics[f"matched_share_{number}"] = [float(share)]
        metrics["assignment_entropy"] = [matching.assignment_entropy(self._matched[mode])]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the metrics of training and of matching."""
        if self.model.training and self._metrics["train"] and self._seconds["step"]:
            share = self._seconds["matching"] / self._seconds["step"]
            self._metrics["train"]["matching_time_share"] = [share]
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; each evaluation has separate totals."""
        self._matched["eval"][:] = 0
        return super().evaluation_loop(*args, **kwargs)

    def _time(self) -> float:
        """Return the time in seconds at which the accelerator has done what it was told so far."""
        device = self.accelerator.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()
