"""Does a model still think after fine-tuning on conversations of several turns?

    python examples/thinking_survives.py

A small Qwen3 learns from scratch to answer by steps of arithmetic, in conversations of one to five
turns (`arithmetic_chats.py` has an example). Then it is fine-tuned on further conversations, in
which the user also subtracts, in five ways (`WAYS`): from the same weights, on the same
conversations in the same order. Afterwards it talks with users who have five requests, turn by
turn, with its own answers in its context as the chat template renders them.

Printed, written and plotted: the shares of turns in which it thinks and in which it is right, after
equally many conversations, and after computing equally many tokens. Takes twelve minutes of CPU
time; the seeds run side by side, one on each core. Everything is written to runs/thinking_survives.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
from arithmetic_chats import (
    DIFFERENCES,
    MAX_NEW_TOKENS,
    NUM_TURNS,
    PRODUCTS,
    SUMS,
    Conversation,
    Judgement,
    judge,
    make_conversation,
    make_model,
    make_tokenizer,
    read_answer,
    solve,
)
from datasets import Dataset
from thinking_report import CONVERSATIONS, N_PASS, ONE_PASS, TOKENS, draw, report
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, build_tree, linearize, render_passes
from onepass_trl.setsft import generate
from onepass_trl.tools import plots
from onepass_trl.tools.bench.results import write

Records = list[dict[str, Any]]
Weights = dict[str, torch.Tensor]


class Way(NamedTuple):
    """A way to train: what it makes of a conversation, and the trainer that takes it."""

    records: Callable[[Conversation], Records]
    trainer: type[SFTTrainer] = SFTTrainer
    options: Mapping[str, Any] = MappingProxyType({})


def whole(messages: Conversation) -> Records:
    return [{"messages": messages}]


def whole_with_reasoning(messages: Conversation) -> Records:
    return [{"messages": messages, "chat_template_kwargs": {"preserve_thinking": True}}]


def last_turn(messages: Conversation) -> Records:
    return [{"prompt": messages[:-1], "completion": messages[-1:]}]


def each_turn(messages: Conversation) -> Records:
    ends = range(2, len(messages) + 1, 2)
    return [record for end in ends for record in last_turn(messages[:end])]


WAYS = {
    "one rendering, all turns": Way(whole, options={"assistant_only_loss": True}),
    "one rendering, last turn": Way(last_turn),
    "all reasoning kept": Way(whole_with_reasoning, options={"assistant_only_loss": True}),
    N_PASS: Way(each_turn),
    ONE_PASS: Way(whole, OnePassSFTTrainer),
}


def make_trainer(
    way: Way,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[Conversation],
    args: argparse.Namespace,
    **settings: Any,
) -> SFTTrainer:
    """Return a trainer for one epoch of the conversations in their order, ``args.batch`` a step."""
    rows = [row for messages in conversations for row in way.records(messages)]
    config = OnePassSFTConfig if way.trainer is OnePassSFTTrainer else SFTConfig
    trainer = way.trainer(
        model,
        config(
            output_dir=str(args.output),
            max_length=None,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch * len(rows) // len(conversations),
            train_sampling_strategy="sequential",
            adam_beta2=0.95,
            activation_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            **way.options,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def make_batches(
    rng: np.random.Generator, operations: list[str], num_batches: int, size: int
) -> list[Conversation]:
    """Return conversations: in each batch of them, equally many of one turn, of two turns ..

    So all batches have equally many turns, and N-pass, a record for each, can have the same.
    """
    lengths = np.resize(NUM_TURNS, size)
    return [
        make_conversation(rng, operations, num_turns)
        for _ in range(num_batches)
        for num_turns in rng.permutation(lengths)
    ]


def learn_to_reason(
    tokenizer: PreTrainedTokenizerFast, seed: int, args: argparse.Namespace
) -> Weights:
    """Return weights trained from scratch, in one pass, on conversations without subtraction."""
    model = make_model(tokenizer, seed)
    rng = np.random.default_rng((seed, 0))
    conversations = make_batches(rng, SUMS + PRODUCTS, args.first_steps, args.batch)
    settings = {"learning_rate": 4e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20}
    make_trainer(WAYS[ONE_PASS], model, tokenizer, conversations, args, **settings).train()
    return model.state_dict()


def with_weights(weights: Weights, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a new model: a trained one has methods that its trainer put in."""
    model = make_model(tokenizer, seed=0)
    model.load_state_dict(weights)
    return model


class Snapshots(TrainerCallback):
    """Copies the weights after some steps, and ends the training after the last of them.

    Attributes:
        taken: by step, the weights and the seconds of training until then.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        self.taken: dict[int, tuple[Weights, float]] = {}
        self._steps = set(steps)
        self._seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self._seconds += time.perf_counter() - self._begin
        if state.global_step in self._steps:
            self.taken[state.global_step] = copy.deepcopy(model.state_dict()), self._seconds
            control.should_training_stop = self.taken.keys() == self._steps


class Tuned(NamedTuple):
    """Fine-tuned weights, and the losses of the steps that it took."""

    weights: Weights
    conversations: int
    tokens: int
    seconds: float
    losses: list[float]


def fine_tune(
    way: Way,
    base: Weights,
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[Conversation],
    num_tokens: int,
    args: argparse.Namespace,
) -> dict[str, Tuned]:
    """Return what a way makes of `base`: of ``args.steps`` batches of conversations, and of as many
    batches as compute about `num_tokens` tokens.
    """
    settings = {"learning_rate": 1.5e-3, "lr_scheduler_type": "constant_with_warmup"}
    model = with_weights(base, tokenizer)
    trainer = make_trainer(way, model, tokenizer, conversations, args, warmup_steps=5, **settings)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    batches = np.reshape(lengths, (-1, trainer.args.per_device_train_batch_size))
    tokens = batches.sum(axis=1).cumsum()  # after each step
    steps = {CONVERSATIONS: args.steps, TOKENS: int(abs(tokens - num_tokens).argmin()) + 1}
    snapshots = Snapshots(steps.values())
    trainer.add_callback(snapshots)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        equal: Tuned(
            weights=snapshots.taken[step][0],
            conversations=step * args.batch,
            tokens=int(tokens[step - 1]),
            seconds=snapshots.taken[step][1],
            losses=losses[:step],
        )
        for equal, step in steps.items()
    }


def converse(
    weights: Weights,
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[Conversation],
) -> dict[str, list[float]]:
    """Return the shares of `Judgement`, by turn, of a model's answers to the users' requests.

    A user goes on from the answer that the model gave: an error counts once.
    """
    model = with_weights(weights, tokenizer)
    histories: list[Conversation] = [[] for _ in conversations]
    shares = []
    for turn in range(0, len(conversations[0]), 2):
        for history, conversation in zip(histories, conversations, strict=True):
            history.append(conversation[turn])
        prompts = [
            tokenizer.apply_chat_template(history, add_generation_prompt=True)["input_ids"]
            for history in histories
        ]
        completions = generate(model, prompts, tokenizer, MAX_NEW_TOKENS)
        answers = [read_answer(text) for text in tokenizer.batch_decode(completions)]
        judged = [judge(a, solve(h)) for a, h in zip(answers, histories, strict=True)]
        shares.append(np.mean(judged, axis=0).tolist())
        for history, answer in zip(histories, answers, strict=True):
            history.append(answer)
    return dict(zip(Judgement._fields, map(list, zip(*shares, strict=True)), strict=True))


def compare(n_pass: Tuned, one_pass: Tuned, base: Weights) -> dict[str, float]:
    """Return how far apart one pass and N-pass end, relative to N-pass."""
    losses = np.array(one_pass.losses) / np.array(n_pass.losses) - 1
    tuned, other, before = (
        torch.cat([weight.double().flatten() for weight in weights.values()])
        for weights in (n_pass.weights, one_pass.weights, base)
    )
    return {
        "first_loss": abs(losses[0]),
        "largest_loss": abs(losses).max(),
        "weights": float((other - tuned).norm() / tuned.norm()),
        "change_of_weights": float((other - tuned).norm() / (tuned - before).norm()),
    }


def run(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the shares of `converse` before fine-tuning and after it in each way, after equally
    many conversations and equally many tokens, and how far apart the two exact ways are.
    """
    silence()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    tokenizer = make_tokenizer()
    rng = np.random.default_rng((seed, 1))
    operations = SUMS + PRODUCTS + DIFFERENCES
    held_out = [make_conversation(rng, operations, NUM_TURNS[-1]) for _ in range(args.held_out)]
    # A rendering without the reasoning has about half of one pass's tokens.
    conversations = make_batches(rng, operations, 2 * args.steps, args.batch)
    num_tokens = sum(
        len(linearize(build_tree(render_passes(messages, tokenizer))))
        for messages in conversations[: args.steps * args.batch]
    )
    base = learn_to_reason(tokenizer, seed, args)
    tuned = {
        name: fine_tune(way, base, tokenizer, conversations, num_tokens, args)
        for name, way in WAYS.items()
    }
    result = {
        "seed": seed,
        "before": converse(base, tokenizer, held_out),
        "ways": {
            name: {
                equal: {
                    "conversations": found.conversations,
                    "tokens": found.tokens,
                    "seconds": found.seconds,
                    **converse(found.weights, tokenizer, held_out),
                }
                for equal, found in after.items()
            }
            for name, after in tuned.items()
        },
        "difference": compare(*(tuned[name][CONVERSATIONS] for name in (N_PASS, ONE_PASS)), base),
    }
    print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    return result


def silence() -> None:
    """Leave out the progress of libraries: this program prints its own."""
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/thinking_survives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first-steps", type=int, default=400, help="that learn to reason")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning in one pass")
    parser.add_argument("--batch", type=int, default=15, help="conversations in a step")
    parser.add_argument("--held-out", type=int, default=200, help="conversations to judge by")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.batch % len(NUM_TURNS):
        parser.error(f"--batch must be a multiple of {len(NUM_TURNS)}, got {args.batch}")
    args.output.mkdir(parents=True, exist_ok=True)
    workers = min(len(args.seeds), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run, args.seeds, itertools.repeat(args)))
    print("\n".join(report(results)))
    for path in (args.output / "results.json", args.json):
        if path is not None:
            write(path, "thinking_survives", results)
    try:
        plots.save(draw(results), args.output / "thinking.png")
    except ImportError:
        print("No figure: pip install matplotlib")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
