"""`onepass-trl estimate`: what one pass would save on a dataset, before anything is trained."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onepass_trl.cli import Parser

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from onepass_trl.preparation.options import PreparationOptions
    from onepass_trl.tools.estimation import Estimate
    from onepass_trl.tools.step_time import StepTime

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    """Print what one pass saves on the dataset that `argv` names; return 0."""
    options = _parse(argv)
    import torch
    from tqdm import tqdm

    from onepass_trl.attention.image_models import why_no_images
    from onepass_trl.cli.arguments import (
        fit_vocabulary,
        load_config,
        load_processing_class,
        preparation_options,
        reading,
    )
    from onepass_trl.tools.estimation import estimate
    from onepass_trl.tools.estimation_report import as_json, report
    from onepass_trl.tools.flops import model_cost
    from onepass_trl.tools.outputs import write_output
    from onepass_trl.tools.transcript import visible_text

    processing_class = load_processing_class(options)
    config = load_config(options.model_name_or_path)
    if config is None and options.measure:
        raise FileNotFoundError(
            f"--measure runs the model with random weights, but {options.model_name_or_path} has "
            "no config.json: name a model's folder, or leave out --measure"
        )
    if config is not None:
        fit_vocabulary(config, processing_class)
    dataset, indices = _load(options)
    preparation = preparation_options(
        options, max_length=options.max_length, overflow=options.overflow, invalid_turns="drop"
    )
    shown = tqdm(indices, desc="estimate", unit="conversation", leave=False)
    records = ((index, dataset[index]) for index in shown)
    with reading("the configuration of", options.model_name_or_path):
        cost = model_cost(config) if config else None
    device = torch.accelerator.current_accelerator(check_available=True)
    found = estimate(
        records,
        processing_class,
        preparation,
        cost,
        features=dataset.features,
        no_images=why_no_images(config) if config else None,
        # With Triton, TRL's fused LM head skips positions without a target.
        scores_every_position=device is None or device.type not in ("cuda", "xpu"),
    )
    times = None
    if options.measure:
        assert config is not None
        times = _measure(options, found, config, dataset, processing_class, preparation)

    what = f"{len(indices):,} of {len(dataset):,}" if len(indices) < len(dataset) else "all"
    print(f"{visible_text(options.dataset)}: {what} conversations\n")
    print("\n".join(report(found, times=times)))
    if options.json is not None:
        value = {"dataset": options.dataset, **as_json(found, times=times)}
        write_output(options.json, json.dumps(value, indent=1) + "\n")
        print(f"Wrote {visible_text(options.json)}")
    if options.png is not None:
        from onepass_trl.tools import plots
        from onepass_trl.tools.estimation_plot import draw

        plots.save(draw(found, Path(options.dataset).name), options.png)
        print(f"Wrote {visible_text(options.png)}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    from onepass_trl.cli.arguments import add_conversation_arguments, at_least, check_outputs
    from onepass_trl.data.packing import OVERFLOW_POLICIES

    parser = Parser(
        prog="onepass-trl estimate",
        description="Count what one pass and N-pass compute on a dataset: tokens, attention, "
        "floating-point operations of the model, rows after packing, what max_length would cut, "
        "and how a single rendering would train the turns. Needs a tokenizer and a config but no "
        "weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_conversation_arguments(parser)
    parser.add_argument(
        "-k",
        "--num_conversations",
        type=at_least(0),
        default=1000,
        help="how many conversations, drawn at random from more; 0 for all",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument(
        "--max_length", type=at_least(2), help="longest row in tokens; unset: any length"
    )
    parser.add_argument(
        "--overflow",
        choices=OVERFLOW_POLICIES,
        default="truncate",
        help="what to do with a turn that, with its context, is longer than max_length",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time forward and backward of the model, with random weights, on a few rows on this "
        "device, and predict the step-time ratio from that",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the measured model (default: float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures as JSON")
    parser.add_argument("--png", metavar="FILE", help="also draw them (needs matplotlib)")
    options = parser.parse_args(argv)
    check_outputs(options)
    return options


def _load(options: argparse.Namespace) -> tuple[Any, list[int]]:
    """Return the dataset, and the indices of the records to look at, ascending."""
    from onepass_trl.cli.conversations import open_dataset

    dataset = open_dataset(options)
    number = options.num_conversations
    if number == 0 or number >= len(dataset):
        return dataset, list(range(len(dataset)))
    return dataset, sorted(random.Random(options.seed).sample(range(len(dataset)), number))


def _measure(
    options: argparse.Namespace,
    found: Estimate,
    config: PreTrainedConfig,
    dataset: Any,
    processing_class: Any,
    preparation: PreparationOptions,
) -> tuple[StepTime, StepTime]:
    import torch
    from tqdm import tqdm

    from onepass_trl.tools.bench.workload import check_memory, random_model
    from onepass_trl.tools.step_time import choose_probes, measure, spread

    chosen = spread(found.row_tokens)
    rows, passes = choose_probes(
        [dataset[int(found.indices[at])] for at in chosen],
        processing_class,
        preparation,
        features=dataset.features,
    )
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    check_memory(
        config,
        dtype,
        device,
        values_per_parameter=2,  # weights and gradients
        what="the model with gradients takes",
        advice="estimate without --measure, or with --dtype bfloat16",
    )
    with torch.device(device):
        model = random_model(config, dtype)
    repeats = 3
    with tqdm(total=(len(rows) + len(passes)) * (repeats + 1), desc="measure", leave=False) as bar:
        return measure(
            model,
            rows,
            passes,
            found.attention_weights,
            processing_class=processing_class,
            repeats=repeats,
            progress=lambda: bar.update() and None,
        )
