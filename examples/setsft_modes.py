"""Do forking tokens keep ways of solving apart? A small task, trained from scratch.

    python examples/setsft_modes.py

Each question is four digits, to be added modulo six. It can be worked out in four ways (modes),
which differ in the order of the additions; a question comes with traces of three of them, in random
order. A small Qwen3 learns from scratch with `SetSFTTrainer`, its four forking tokens matched by
least cost ("hungarian"), at random, or in the order of the traces ("fixed"), from three seeds each.

Then each token is asked to solve held-out questions (sampled, temperature 1). The mutual
information between forking token and mode (0: the token says nothing; log 4 = 1.39 nats: each token
has its own mode) and the accuracy after each token are printed and plotted. It takes about eight
minutes on two cores; everything it writes is in runs/setsft_modes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from small_model import make_tiny_model
from transformers import PreTrainedTokenizerFast

from onepass_trl import SetSFTConfig, SetSFTTrainer
from onepass_trl.setsft import forking_prompts, generate, mutual_information
from onepass_trl.versions import checkpointing_option

BASE = 6
NUM_TRACES = 3
METHODS = ("hungarian", "random", "fixed")
# The order in which the digits a, b, c, d are added, as operands of three additions; x and y are
# the results of the first two.
MODES = {
    "left to right": ("ab", "xc", "yd"),
    "right to left": ("dc", "xb", "ya"),
    "pairs": ("ab", "cd", "xy"),
    "outside in": ("ad", "bc", "xy"),
}


def trace(digits: list[int], mode: str) -> str:
    """Return the reasoning of a mode and the answer, such as ``<think>1+2=3,3+4=7 .. </think>7``.

    >>> trace([1, 2, 3, 5], "pairs")
    '<think>1+2=3,3+5=2,3+2=5</think>5'
    """
    values = dict(zip("abcd", digits, strict=True))
    steps = []
    for result, (left, right) in zip("xyz", MODES[mode], strict=True):
        values[result] = (values[left] + values[right]) % BASE
        steps.append(f"{values[left]}+{values[right]}={values[result]}")
    return f"<think>{','.join(steps)}</think>{values['z']}"


def make_questions(num: int, seed: int) -> list[list[int]]:
    """Return different questions whose modes all give different traces."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], list[int]] = {}
    while len(found) < num:
        digits = rng.integers(0, BASE, 4).tolist()
        if len({trace(digits, mode) for mode in MODES}) == len(MODES):
            found[tuple(digits)] = digits
    return list(found.values())


def make_dataset(questions: list[list[int]], seed: int) -> datasets.Dataset:
    """Return the questions with traces of some modes each, in random order."""
    rng = np.random.default_rng(seed)
    modes = list(MODES)
    rows = [
        {
            "prompt": "".join(map(str, digits)),
            "completions": [trace(digits, modes[i]) for i in rng.permutation(4)[:NUM_TRACES]],
        }
        for digits in questions
    ]
    return datasets.Dataset.from_list(rows)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    characters = ["<pad>", "<eos>", *"0123456789+=,"]
    model = tokenizers.models.WordLevel(dict(zip(characters, range(99), strict=False)), "<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train(
    method: str, seed: int, dataset: datasets.Dataset, args: argparse.Namespace
) -> SetSFTTrainer:
    """Train a model from scratch and return its trainer."""
    tokenizer = make_tokenizer()
    trainer = SetSFTTrainer(
        make_tiny_model(tokenizer, seed, max_position_embeddings=64),
        SetSFTConfig(
            output_dir=str(args.output / f"{method}-{seed}"),
            num_forking_tokens=args.tokens,
            matching=method,
            max_length=None,
            padding_free=True,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            **{checkpointing_option(): False},
            logging_steps=max(args.steps // 8, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def evaluate(trainer: SetSFTTrainer, questions: list[list[int]], seed: int) -> dict[str, Any]:
    """Return what the model does after each forking token on held-out questions."""
    tokenizer, num_tokens = trainer.processing_class, trainer.args.num_forking_tokens
    prompts = [
        prompt
        for digits in questions
        for prompt in forking_prompts("".join(map(str, digits)), tokenizer, num_tokens)
    ]
    torch.manual_seed(seed)
    completions = tokenizer.batch_decode(
        generate(trainer.model, prompts, tokenizer, 24, temperature=1.0)
    )
    correct = np.zeros(num_tokens)
    modes: list[tuple[int, str]] = []
    for number, completion in enumerate(completions):
        digits, token = questions[number // num_tokens], number % num_tokens
        text = "<think>" + completion.replace(" ", "")
        correct[token] += text.rpartition("</think>")[2] == str(sum(digits) % BASE)
        mode = next((mode for mode in MODES if text == trace(digits, mode)), "none of them")
        modes.append((token, mode))
    counts = Counter(modes)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "mutual_information": mutual_information(modes),
        "accuracy": (correct / len(questions)).tolist(),
        "modes": [[counts[token, mode] for mode in MODES] for token in range(num_tokens)],
        "none_of_them": sum(mode == "none of them" for _, mode in modes) / len(modes),
        "loss": history[-1]["loss"],
        "matched_share": [history[-1][f"matched_share_{i}"] for i in range(1, num_tokens + 1)],
    }


def print_table(results: list[dict[str, Any]]) -> None:
    print("\nmatching   seed  mutual information  accuracy after each token  no mode's trace")
    for result in results:
        accuracy = "  ".join(f"{share:.2f}" for share in result["accuracy"])
        print(
            f"{result['matching']:10} {result['seed']:4}  {result['mutual_information']:13.3f} nats"
            f"  {accuracy:>25}  {result['none_of_them']:15.2f}"
        )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw mutual information, accuracy, and for the first seed which token has which mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_tokens = len(results[0]["accuracy"])
    figure = pyplot.figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    information, accuracy = top.subplots(1, 2)
    maps = bottom.subplots(1, len(METHODS), sharey=True)
    for number, method in enumerate(METHODS):
        own = [result for result in results if result["matching"] == method]
        values = [result["mutual_information"] for result in own]
        information.bar(number, np.mean(values), width=0.6, alpha=0.4)
        information.scatter([number] * len(values), values, color="black", s=12, zorder=3)
        shares = np.array([result["accuracy"] for result in own])
        places = number + np.linspace(-0.3, 0.3, num_tokens)
        accuracy.bar(places, shares.mean(axis=0), width=0.7 / num_tokens, alpha=0.4)
        accuracy.scatter(np.tile(places, len(own)), shares, color="black", s=8, zorder=3)
        maps[number].imshow(np.array(own[0]["modes"]), cmap="Blues", vmin=0)
        maps[number].set_title(f"{method}, seed {own[0]['seed']}")
        maps[number].set_xticks(range(len(MODES)), [m.replace(" ", "\n") for m in MODES], size=8)
        maps[number].set_yticks(range(num_tokens), [f"<think{i + 1}>" for i in range(num_tokens)])
        for (token, mode), count in np.ndenumerate(own[0]["modes"]):
            shade = "white" if count > np.max(own[0]["modes"]) / 2 else "black"
            maps[number].text(mode, token, count, ha="center", va="center", color=shade)
    information.axhline(math.log(len(MODES)), color="grey", linestyle="--", linewidth=1)
    information.set_title("mutual information of token and mode, nats (dashed: log 4)")
    accuracy.set_title("accuracy after each token")
    accuracy.set_ylim(0, 1.05)
    for axes in (information, accuracy):
        axes.set_xticks(range(len(METHODS)), METHODS)
    bottom.suptitle("held-out questions solved by each mode after each token")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/setsft_modes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=4, help="forking tokens")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch", type=int, default=32, help="questions in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=200, help="of these questions")
    args = parser.parse_args()
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)
    questions = make_questions(args.questions, seed=0)
    held_out, trained = questions[: args.held_out], questions[args.held_out :]
    results = []
    for seed in args.seeds:
        dataset = make_dataset(trained, seed)
        for method in METHODS:
            begin = time.perf_counter()
            trainer = train(method, seed, dataset, args)
            result = evaluate(trainer, held_out, seed)
            results.append({"matching": method, "seed": seed, **result})
            print(
                f"{method}, seed {seed}: {time.perf_counter() - begin:.0f} s, mutual information "
                f"{result['mutual_information']:.3f} nats, accuracy "
                f"{np.mean(result['accuracy']):.2f}",
                flush=True,
            )
    print_table(results)
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    try:
        plot(results, args.output / "modes.png")
    except ImportError:
        print("No plot: pip install matplotlib")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
