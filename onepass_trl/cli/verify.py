"""`onepass-trl verify`: one pass against N passes, on your model and conversations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from onepass_trl.cli import Parser
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from onepass_trl.chat.processing import ProcessingClass
    from onepass_trl.tools.verify import Comparison

_HEADER = (
    f"{'':19}{'tokens':>9}{'':19}{'':9}{'rel. difference':>26}{'seconds':>11}\n"
    f"{'conversation':>12} {'turns':>6}{'N-pass':>9} / one pass = ratio"
    f"{'loss':>9}{'of loss':>15}{'gradient':>11}{'N-pass':>10} / one pass = ratio"
)


def main(argv: list[str]) -> int:
    """Compare conversations as `argv` says; return 0 if all agree within tolerance, else 1."""
    options = _parse(argv)
    from tqdm import tqdm

    from onepass_trl.cli.arguments import load_processing_class
    from onepass_trl.cli.conversations import load_passes
    from onepass_trl.tools.verify import compare

    processing_class = load_processing_class(options)
    conversations = load_passes(options, processing_class)
    model = _load_model(options, processing_class)
    # Not reported: the first use allocates, compiles and starts threads.
    compare(model, conversations[0][:1], processing_class)
    comparisons = [
        compare(model, passes, processing_class)
        for passes in tqdm(conversations, desc="verify", unit="conversation", leave=False)
    ]
    print(format_table(comparisons))
    tolerances = (options.loss_tolerance, options.gradient_tolerance)
    failed = [index for index, item in enumerate(comparisons) if not item.agrees(*tolerances)]
    limits = f"within {tolerances[0]:g} (loss) and {tolerances[1]:g} (gradients)"
    if not failed:
        number = counted(len(comparisons), "conversation")
        print(f"One pass agrees with N-pass {limits} on {number}.")
        return 0
    worst = max(failed, key=lambda index: comparisons[index].gradient_difference)
    print(
        f"One pass differs from N-pass: it is not {limits} on {len(failed)} of "
        f"{counted(len(comparisons), 'conversation')}. Largest gradient difference: "
        f"conversation {worst}, {comparisons[worst].worst_parameter}."
    )
    if options.dtype != "float32":
        print(
            f"{options.dtype} rounds more than float32: --dtype float32 separates rounding from "
            "real errors."
        )
    return 1


def format_table(comparisons: list[Comparison]) -> str:
    """Return the comparisons as lines of text, one for each conversation, and their totals."""
    lines = [_HEADER, *(_line(str(i), [item]) for i, item in enumerate(comparisons))]
    return "\n".join([*lines, _line("all", comparisons)])


def _line(name: str, items: list[Comparison]) -> str:
    num_trained = sum(item.num_trained for item in items)
    loss = sum(item.one_pass_loss * item.num_trained for item in items) / num_trained
    tokens = [sum(getattr(item, f"{way}_pass_tokens") for item in items) for way in ("n", "one")]
    seconds = [sum(getattr(item, f"{way}_pass_seconds") for item in items) for way in ("n", "one")]
    return (
        f"{name:>12} {sum(item.num_turns for item in items):6}"
        f"{tokens[0]:9} / {tokens[1]:<8} = {tokens[0] / tokens[1]:5.2f}"
        f"{loss:9.4f}"
        f"{max(item.loss_difference for item in items):15.1e}"
        f"{max(item.gradient_difference for item in items):11.1e}"
        f"{seconds[0]:10.3f} / {seconds[1]:<8.3f} = {seconds[0] / seconds[1]:5.2f}"
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    from onepass_trl.cli.arguments import DATASET_HELP, add_reading_arguments, at_least

    parser = Parser(
        prog="onepass-trl verify",
        description="Compute loss and gradients of some conversations in N separate passes and in "
        "one, and compare them, the tokens and the time. Exits with 1 if loss or gradients "
        "differ beyond tolerance.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dataset", nargs="?", help=DATASET_HELP)
    parser.add_argument("--dataset_name", help="another way to name the dataset")
    parser.add_argument("--model_name_or_path", required=True, help="model of the Hub, or a folder")
    parser.add_argument(
        "--model_from_config",
        action="store_true",
        help="use random weights, so that the folder needs only a config and a tokenizer",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "-k",
        "--num_conversations",
        type=at_least(1),
        default=4,
        help="how many conversations, from the first one",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32"
    )
    parser.add_argument("--max_length", type=at_least(2), help="cut each pass to its first tokens")
    parser.add_argument(
        "--loss_tolerance",
        type=at_least(0, float),
        default=1e-6,
        help="largest relative difference of the loss",
    )
    parser.add_argument(
        "--gradient_tolerance",
        type=at_least(0, float),
        default=1e-4,
        help="largest difference of a parameter's gradient, relative in norm",
    )
    options = parser.parse_args(argv)
    if (options.dataset is None) == (options.dataset_name is None):
        parser.error("name one dataset: as the first argument, or with --dataset_name")
    if options.dataset is None:
        options.dataset = options.dataset_name
    return options


def _load_model(options: argparse.Namespace, processing_class: ProcessingClass) -> Any:
    import torch

    from onepass_trl.chat.processing import tokenizer_of
    from onepass_trl.cli.arguments import read_config, reading
    from onepass_trl.tools.bench.workload import random_model
    from onepass_trl.tools.model_class import auto_model

    config = read_config(options.model_name_or_path)
    dtype = getattr(torch, options.dtype)
    if options.model_from_config:
        with reading("the configuration of", options.model_name_or_path):
            model = random_model(config, dtype)
    else:
        with reading("the weights of", options.model_name_or_path):
            model = auto_model(config).from_pretrained(options.model_name_or_path, dtype=dtype)
    if options.chat_template_path is not None:  # tokens may have come with it
        num_tokens = len(tokenizer_of(processing_class))
        if model.get_input_embeddings().num_embeddings < num_tokens:
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
