"""A training step on conversations: `OnePassSFTTrainer` against N-pass in TRL's ``SFTTrainer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from onepass_trl.data import build_tree, linearize
from onepass_trl.passes import Pass
from onepass_trl.tools.bench.timing import min_and_median, reason, seconds_of
from onepass_trl.tools.bench.workload import labelled
from onepass_trl.training import OnePassSFTConfig, OnePassSFTTrainer
from onepass_trl.versions import checkpointing_option
from onepass_trl.visibility import num_executed_pairs, num_visible_pairs

ONE_PASS, N_PASS = "one pass", "N-pass"


class Way(NamedTuple):
    """A way to train, with its own copy of the model."""

    trainer: SFTTrainer
    optimizer: torch.optim.Optimizer


def make_trainers(
    conversations: Sequence[Sequence[Pass]],
    make_model: Callable[[], PreTrainedModel],
    folder: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    use_cpu: bool,
    **settings: Any,
) -> dict[str, SFTTrainer]:
    """Return a trainer for each way, with equal models and settings, on the same passes.

    N-pass is one row per pass, its context masked out, without padding: the ordinary exact way.

    Args:
        conversations: passes of each.
        make_model: returns equal models.
        tokenizer: used only for its special tokens.
        use_cpu: whether to use the CPU even if there is an accelerator.
        settings: further options of both trainers' configurations.
    """
    rows = [[labelled(pass_) for pass_ in passes] for passes in conversations]
    tokenizer = tokenizer or _blank_tokenizer()
    options: dict[str, Any] = dict(
        output_dir=folder,
        max_length=None,
        per_device_train_batch_size=1,
        bf16=False,
        use_cpu=use_cpu,
        report_to="none",
    )
    options |= {checkpointing_option(): False, **settings}
    every = [row for passes in rows for row in passes]
    accumulated = {"gradient_accumulation_steps": len(every) // len(rows)}
    return {
        ONE_PASS: OnePassSFTTrainer(
            make_model(),
            OnePassSFTConfig(**options),
            train_dataset=Dataset.from_list([{"passes": passes} for passes in rows]),
            processing_class=tokenizer,
        ),
        N_PASS: SFTTrainer(
            make_model(),
            SFTConfig(**{**accumulated, **options}),
            train_dataset=Dataset.from_list(every),
            processing_class=tokenizer,
        ),
    }


def _blank_tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )


def measure_step(
    conversations: Sequence[Sequence[Pass]],
    make_model: Callable[[], PreTrainedModel],
    *,
    repeats: int,
    use_cpu: bool,
    budget_s: float = 120.0,
) -> dict[str, Any]:
    """Return tokens, times and losses of one optimizer step over the conversations, both ways.

    A step is forward, loss and backward of each row, one row per batch, and AdamW. Both ways are
    timed in turn, each with a copy of the model; times are in seconds, minimum and median. A way
    that cannot run has None for figures, and ``note`` says why.

    Args:
        conversations: passes of each.
        make_model: returns equal models.
        repeats: how many steps are timed, after one to warm up.
        use_cpu: whether to use the CPU even if there is an accelerator.
        budget_s: no further repeat begins after this many seconds of steps; one is always timed.

    Raises:
        ValueError: if the model can't be trained in one pass, or several accelerators are seen.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(conversations, make_model, folder, use_cpu=use_cpu)
    for trainer in trainers.values():
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"a step is measured on one accelerator, and {trainer.args.n_gpu} are visible: "
                "set CUDA_VISIBLE_DEVICES=0"
            )
    running = {
        name: Way(trainer, torch.optim.AdamW(trainer.model.parameters(), lr=1e-4))
        for name, trainer in trainers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in running}
    losses: dict[str, list[float]] = {name: [] for name in running}
    notes = []
    for number in range(repeats + 1):
        if number > 1 and sum(map(sum, times.values())) > budget_s:
            break
        for name, way in list(running.items()):
            try:
                seconds, loss = _time_step(way)
            except RuntimeError as error:  # out of memory
                notes.append(f"{name}: {reason(error)}")
                del running[name]
                times[name], losses[name] = [], []
                continue
            times[name].append(seconds)
            losses[name].append(loss)
    timed = {name: values[1:] for name, values in times.items()}  # without the warm-up
    return {**_counts(conversations), **_figures(timed, losses), "note": "; ".join(notes) or None}


def _time_step(way: Way) -> tuple[float, float]:
    """Return the seconds of one optimizer step over all rows, and its loss."""
    trainer, optimizer = way
    batches = list(trainer.get_train_dataloader())
    losses: list[float] = []

    def step() -> None:
        num_items = trainer._get_num_items_in_batch(batches, trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            losses.append(trainer.training_step(trainer.model, batch, num_items).item())
        optimizer.step()
        optimizer.zero_grad()

    return seconds_of(step, trainer.args.device), sum(losses)


def _counts(conversations: Sequence[Sequence[Pass]]) -> dict[str, Any]:
    rows = [linearize(build_tree(passes)).visible_end for passes in conversations]
    useful, executed = sum(map(num_visible_pairs, rows)), sum(map(num_executed_pairs, rows))
    n_pass = sum(len(pass_) for passes in conversations for pass_ in passes)
    one_pass = sum(row.size for row in rows)
    return {
        "conversations": len(conversations),
        "turns": sum(map(len, conversations)),
        "n_pass_tokens": n_pass,
        "one_pass_tokens": one_pass,
        "token_ratio": n_pass / one_pass,
        "executed_over_useful": executed / useful,
    }


def _figures(times: dict[str, list[float]], losses: dict[str, list[float]]) -> dict[str, Any]:
    n_pass, one_pass = times[N_PASS], times[ONE_PASS]
    differences = [abs(a - b) / b for a, b in zip(losses[ONE_PASS], losses[N_PASS], strict=False)]
    return {
        "repeats": max(len(n_pass), len(one_pass)),
        **min_and_median("n_pass", "seconds", n_pass),
        **min_and_median("one_pass", "seconds", one_pass),
        "n_pass_loss": losses[N_PASS][0] if losses[N_PASS] else None,
        "one_pass_loss": losses[ONE_PASS][0] if losses[ONE_PASS] else None,
        "speedup": min(n_pass) / min(one_pass) if n_pass and one_pass else None,
        "largest_loss_difference": max(differences, default=None),
    }
