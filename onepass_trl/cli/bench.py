"""`onepass-trl bench`: time attention and training steps against alternatives."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from onepass_trl.cli import Parser
from onepass_trl.wording import counted

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from onepass_trl.passes import Pass

_MOST_TOKENS = 10**8  # of a made-up chat, which would fill the memory before anything is said
_TURN = {"turns": 10, "user": 60, "reasoning": 260, "response": 150}


class _Subject(NamedTuple):
    """What is measured."""

    config: PretrainedConfig
    conversations: list[list[Pass]]
    dtype: torch.dtype
    device: torch.device


def main(argv: list[str]) -> int:
    """Time what `argv` asks for and print it; return 0."""
    options = _parse(argv)
    import torch

    from onepass_trl.tools.bench.results import write
    from onepass_trl.tools.transcript import visible_text

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if options.use_cpu or accelerator is None else accelerator
    default = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, options.dtype or default)
    config = _load_config(options)
    conversations = _load_passes(options, config)
    _check(options, config, dtype, device)
    print(_describe(options, config, conversations))
    print(f"device: {_device_name(device)}; {str(dtype).removeprefix('torch.')}", flush=True)
    subject = _Subject(config, conversations, dtype, device)
    results: list[dict[str, Any]] = []
    if not options.step:
        results += _attention(subject, options)
    if not options.attention:
        results += _step(subject, options)
    if options.json is not None:
        write(options.json, "bench", results, ["onepass-trl", "bench", *argv])
        print(f"\nWrote {visible_text(options.json)}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    from onepass_trl.cli.arguments import at_least, check_outputs

    parser = Parser(
        prog="onepass-trl bench",
        description="Time attention of one layer against SDPA and FlexAttention, and a training "
        "step against N-pass in TRL's SFTTrainer, in one run and in turn. The input is "
        "the passes of a dataset's conversations or a chat of random tokens; the model has the "
        "shape of the given one, or of a small Qwen3, and random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_subject(parser)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--attention", action="store_true", help="time attention only")
    only.add_argument("--step", action="store_true", help="time training steps only")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="time only these in attention")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of weights and inputs (default: float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--use_cpu", action="store_true", help="don't use the accelerator")
    parser.add_argument("--threads", type=at_least(1), help="threads of the CPU (default: torch's)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, help="timed runs, after one to warm up"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    options = parser.parse_args(argv)
    num_cpus = os.cpu_count() or 1
    if options.threads is not None and options.threads > num_cpus:
        parser.error(
            f"--threads: expected at most {num_cpus}, the CPUs of this machine, got "
            f"{options.threads}"
        )
    given = [name for name in _TURN if name in options]
    if options.dataset is not None and given:
        parser.error(f"--{given[0]} shapes a chat of random tokens, but a dataset is given too")
    if options.dataset is not None and options.model_name_or_path is None:
        parser.error("a dataset needs --model_name_or_path, whose tokenizer renders it")
    for name in ("peers", "packed"):
        if options.step and getattr(options, name):
            parser.error(f"--{name} is about attention, but --step times training steps only")
    if options.dataset is None:
        for name in (
            "train_on",
            "chat_template_kwargs",
            "chat_template_path",
            "null_arguments",
            "ignored_columns",
            "num_conversations",
            "packed",
        ):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name} needs a dataset, but none is given")
    for name, value in _TURN.items():
        setattr(options, name, getattr(options, name, value))
    check_outputs(options)
    return options


def _add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is measured: conversations and model."""
    from onepass_trl.cli.arguments import DATASET_HELP, add_reading_arguments, at_least

    parser.add_argument("dataset", nargs="?", help=DATASET_HELP)
    parser.add_argument(
        "--model_name_or_path",
        help="model of the Hub, or a folder: its config, and for a dataset its tokenizer",
    )
    parser.add_argument(
        "--num_layers", type=at_least(1), help="keep only the first layers of the model"
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "-k",
        "--num_conversations",
        type=at_least(1),
        default=1,
        help="how many conversations a step takes, from the first; attention takes the longest",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="attention takes all of these conversations, in one row, as packing puts them",
    )
    parser.add_argument("--max_length", type=at_least(2), help="cut each pass to its first tokens")
    for name, value in _TURN.items():
        what = "turns" if name == "turns" else f"tokens of a turn's {name}"
        parser.add_argument(
            f"--{name}",
            type=at_least(1),
            default=argparse.SUPPRESS,
            help=f"without a dataset: {what} (default: {value})",
        )


def _check(
    options: argparse.Namespace, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise if the model can't be trained in one pass or a step needs too much memory, before any
    measurement is taken."""
    from onepass_trl.cli.arguments import reading
    from onepass_trl.tools.bench.workload import check_memory
    from onepass_trl.tools.flops import model_cost

    with reading("the configuration of", options.model_name_or_path or "the small model"):
        model_cost(config)
    if not options.attention:
        check_memory(
            config,
            dtype,
            device,
            # Both ways have a model: weights, gradients and the two moments of AdamW.
            values_per_parameter=2 * 4,
            what="two copies of the model with gradients and AdamW take",
            advice="use fewer layers with --num_layers, or time attention only with --attention",
        )


def _load_config(options: argparse.Namespace) -> PretrainedConfig:
    from onepass_trl.cli.arguments import read_config
    from onepass_trl.tools.bench.workload import small_config, trim_layers

    if options.model_name_or_path is None:
        config = small_config()
    else:
        config = read_config(options.model_name_or_path)
    if options.num_layers is not None:
        trim_layers(config, options.num_layers)
    return config


def _load_passes(options: argparse.Namespace, config: PretrainedConfig) -> list[list[Pass]]:
    from onepass_trl.cli.arguments import fit_vocabulary, load_processing_class
    from onepass_trl.cli.conversations import limit_length, load_passes
    from onepass_trl.tools.bench.workload import chat_passes

    if options.dataset is not None:
        processing_class = load_processing_class(options)
        fit_vocabulary(config, processing_class)
        conversations = load_passes(options, processing_class)
        if any(pass_.images for passes in conversations for pass_ in passes):
            raise ValueError(
                f"{options.dataset} has images, and bench times text only: remove them, or let "
                "estimate --measure time the model on them"
            )
        return conversations
    vocab_size = config.get_text_config().vocab_size
    # Of N passes: a turn's own tokens, and what later turns see of it.
    turns, seen = options.turns, options.user + options.response
    tokens = turns * (seen + options.reasoning) + seen * turns * (turns - 1) // 2
    if tokens > _MOST_TOKENS:
        raise ValueError(
            f"the chat has {tokens:,} tokens in its N passes, expected at most {_MOST_TOKENS:,}: "
            "lower --turns, --user, --reasoning or --response"
        )
    passes = chat_passes(
        options.turns, options.user, options.reasoning, options.response, vocab_size
    )
    return [limit_length(passes, options.max_length, "the chat")]


def _device_name(device: torch.device) -> str:
    from onepass_trl.tools.bench.results import machine

    facts = machine()
    if device.type == "cpu":
        return f"{facts['cpu']} ({facts['isa']}), {counted(facts['threads'], 'thread')}"
    return facts["accelerator"] or str(device)


def _describe(
    options: argparse.Namespace, config: PretrainedConfig, conversations: list[list[Pass]]
) -> str:
    """Return a description of what is measured."""
    from onepass_trl.tools.transcript import visible_text

    text = config.get_text_config()
    name = options.model_name_or_path or "a small Qwen3"
    if options.dataset is None:
        turn = ", ".join(f"{getattr(options, name)} of {name}" for name in list(_TURN)[1:])
        turns = counted(options.turns, "turn")
        what = f"a chat of random tokens, {turns} (tokens of a turn: {turn})"
    else:
        what = f"{counted(len(conversations), 'conversation')} of {options.dataset}"
    return visible_text(
        f"conversations: {what}\n"
        f"model: {name}: {counted(text.num_hidden_layers, 'layer')}, "
        f"hidden size {text.hidden_size}, "
        f"{text.vocab_size:,} tokens of vocabulary; random weights"
    )


def _attention(subject: _Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time attention on the longest conversation's row, or on all of them in one."""
    from onepass_trl.data import build_tree, concatenate, linearize
    from onepass_trl.tools.bench.attention import measure_attention
    from onepass_trl.tools.bench.report import attention_table
    from onepass_trl.tools.bench.workload import attention_shape

    rows = [linearize(build_tree(passes)) for passes in subject.conversations]
    row = concatenate(rows) if options.packed else max(rows, key=len)
    results = measure_attention(
        row.visible_end,
        attention_shape(subject.config),
        dtype=subject.dtype,
        device=subject.device,
        repeats=options.repeats,
        peers=options.peers,
    )
    print("", attention_table(results), sep="\n", flush=True)
    return [{"part": "attention", **result} for result in results]


def _step(subject: _Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time training steps on all conversations."""
    import datasets

    from onepass_trl.tools.bench.report import step_table
    from onepass_trl.tools.bench.step import measure_step
    from onepass_trl.tools.bench.workload import random_model

    datasets.disable_progress_bars()
    result = measure_step(
        subject.conversations,
        lambda: random_model(subject.config, subject.dtype),
        repeats=options.repeats,
        use_cpu=subject.device.type == "cpu",
    )
    print("", step_table(result), sep="\n", flush=True)
    return [{"part": "step", **result}]
