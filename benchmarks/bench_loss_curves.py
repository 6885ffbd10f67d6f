"""Loss of every step of a training run, in one pass and in N passes.

Both trainers train the same small model on the same conversations in the same order:
`OnePassSFTTrainer` with one conversation per step, TRL's `SFTTrainer` with its passes, one per
batch, with gradient accumulation. So each conversation is cut to the same number of turns.

    python benchmarks/bench_loss_curves.py --json benchmarks/results/loss_curves.json

``--bf16`` trains on the accelerator, if there is one, and in bfloat16.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from command import make_parser, parse
from trl import SFTTrainer

from onepass_trl import render_passes
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.step import N_PASS, ONE_PASS, make_trainers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from small_model import make_model, make_tokenizer, read_conversations

SETTINGS: dict[str, Any] = dict(
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    adam_beta2=0.95,
    train_sampling_strategy="sequential",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
)


def losses_of(trainer: SFTTrainer) -> list[float]:
    """Train, and return the loss of each step: the sum over its equally weighted batches."""
    parts: list[float] = []
    training_step = trainer.training_step

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(*args, **kwargs)
        parts.append(loss.item())  # the log rounds it
        return loss

    trainer.training_step = recording
    trainer.train()
    per_step = trainer.args.gradient_accumulation_steps
    return np.reshape(parts, (-1, per_step)).sum(axis=1).tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--turns", type=int, default=3, help="first turns of each conversation")
    parser.add_argument("--bf16", action="store_true", help="on the accelerator, in bfloat16")
    args = parse(parser, arguments)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    conversations = read_conversations()
    tokenizer = make_tokenizer(conversations)
    rendered = [
        render_passes(
            conversation["messages"],
            tokenizer,
            tools=conversation.get("tools"),
            train_on=list(range(args.turns)),
        )
        for conversation in conversations
    ]
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(len(rendered)) for _ in range(-(-args.steps // len(rendered)))]
    order = np.concatenate(epochs)[: args.steps]
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(
            [rendered[number] for number in order],
            lambda: make_model(tokenizer),
            folder,
            tokenizer,
            use_cpu=not args.bf16,
            bf16=args.bf16,
            max_steps=args.steps,
            **SETTINGS,
        )
        losses = {name: losses_of(trainer) for name, trainer in trainers.items()}
    results = [
        {"step": step, "n_pass_loss": n_pass, "one_pass_loss": one_pass}
        for step, (n_pass, one_pass) in enumerate(
            zip(losses[N_PASS], losses[ONE_PASS], strict=True), start=1
        )
    ]
    differences = [abs(row["one_pass_loss"] / row["n_pass_loss"] - 1) for row in results]
    print(
        f"{args.steps} steps, loss {results[0]['n_pass_loss']:.3f} to "
        f"{results[-1]['n_pass_loss']:.3f}; relative difference: {differences[0]:.1e} at first, "
        f"at most {max(differences):.1e}"
    )
    if args.json:
        write(args.json, "loss_curves", results)
    # Of the same weights: what follows amplifies any difference.
    if differences[0] > (1e-2 if args.bf16 else 1e-5):
        raise SystemExit("the first losses differ by more than rounding")


if __name__ == "__main__":
    main()
