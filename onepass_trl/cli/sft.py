"""`onepass-trl sft`: TRL's `trl sft` with `OnePassSFTTrainer`, same flags, YAML and launcher.

``onepass-trl sft ...`` starts this module through accelerate, in as many processes as asked for.
Other ways to launch it: ``accelerate launch -m onepass_trl.cli.sft ...`` or
``torchrun -m onepass_trl.cli.sft ...``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

_SECONDS_TO_END = 30  # after an interrupt
_DATASET = ("--dataset_name", "--dataset-name")
_FILES = ("--config", "--accelerate_config")  # TRL reads them as two arguments only


def main(argv: list[str]) -> int:
    """Launch the training named by `argv` through accelerate and return its exit status."""
    return launch(argv, make_parser(), "onepass_trl.cli.sft")


def launch(argv: list[str], parser: Any, module: str) -> int:
    """Run a training module through accelerate and return its exit status.

    Args:
        argv: flags of `parser`, and any of ``accelerate launch``.
        parser: its second result is the training configuration.
        module: name of the module, which gets the flags of `parser`.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    argv = _as_flags(argv)
    # Parsed here too, so that wrong flags are reported once and before any process starts. Flags
    # that the parser doesn't know are accelerate's: --num_processes, --accelerate_config ..
    _, training_args, *_, from_config, from_argv = _parse(
        parser, argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_arguments = resolve_accelerate_config_argument(from_config + from_argv)
    training_arguments = _without(argv, from_argv)
    command = [*launch_arguments, "--module", module, *training_arguments]
    options = launch_command_parser().parse_args(command)
    if training_args.device.type == "cpu":
        _share_cpu(options)
    try:
        launch_command(options)
    except KeyboardInterrupt:
        if not _have_ended():
            raise
        return 128 + signal.SIGINT  # they have got the signal too, and reported it
    except SignalException as error:  # several processes, which torch has ended
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:  # one process, which has reported the error
        return error.returncode
    except ChildFailedError as error:  # several processes
        _, failure = error.get_first_failure()
        return failure.exitcode
    return 0


def _have_ended() -> bool:
    """Return whether the processes that were started end by themselves; end those that don't."""
    _, running = psutil.wait_procs(psutil.Process().children(), timeout=_SECONDS_TO_END)
    for process in running:
        process.terminate()
    psutil.wait_procs(running)
    return not running


def _share_cpu(options: Any) -> None:
    """Start the processes of a CPU run as processes of torch.distributed, and share out its CPUs.

    accelerate starts one process instead of several unless it finds GPUs, and gives it one thread,
    which suits machines that compute on GPUs. The user's OMP_NUM_THREADS is left alone.
    """
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    num_processes = options.num_processes
    if num_processes is None and options.config_file is not None:
        num_processes = load_config_from_file(options.config_file).num_processes
    num_processes = num_processes or 1
    if num_processes > 1 and not options.use_fsdp and not options.use_deepspeed:
        options.multi_gpu = True
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if options.num_cpu_threads_per_process is None and not threads.isdigit():
        options.num_cpu_threads_per_process = max(torch.get_num_threads() // num_processes, 1)


def make_parser() -> Any:
    """Return the `TrlParser` of `trl sft`, with `OnePassSFTConfig` in place of `SFTConfig`."""
    from onepass_trl.training import OnePassSFTConfig

    return parser_of(OnePassSFTConfig, "sft")


def parser_of(config: type, verb: str) -> Any:
    """Return the `TrlParser` of a verb: the flags of `trl sft`, with this configuration."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    return TrlParser(types, prog=f"onepass-trl {verb}")


def train(argv: list[str]) -> int:
    """Train in this process, as `argv` says; return 0."""
    from onepass_trl.training import OnePassSFTTrainer

    return run(argv, make_parser(), OnePassSFTTrainer)


def run(argv: list[str], parser: Any, trainer_class: Any) -> int:
    """Train in this process with this trainer, as `argv` says; return 0."""
    from trl import get_peft_config, get_quantization_config

    from onepass_trl.cli.arguments import reading, using_flags, weights_in
    from onepass_trl.tools.outputs import check_output_folder

    script_args, training_args, model_args, mixture = _parse(
        parser, _as_flags(argv), fail_with_unknown_args=False
    )
    if not model_args.model_name_or_path:
        raise ValueError("no model: give --model_name_or_path (Hub name or local folder)")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != training_args.world_size:
        raise ValueError(
            f"{started} processes were started, but each would train alone: on the CPU they find "
            "one another with --use_cpu"
        )
    # All processes of a machine that saves say so: they would wait for one that has ended.
    if training_args.save_on_each_node or os.environ.get("GROUP_RANK", "0") == "0":
        check_output_folder(training_args.output_dir)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    wants_eval = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_datasets(
        script_args, mixture, wants_eval, training_args.dataset_text_field
    )
    model_files = reading("the model", model_args.model_name_or_path, among_others=True)
    with model_files, using_flags():
        trainer = trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    # Only a YAML file has values that aren't text.
    resume: Any = training_args.resume_from_checkpoint
    resume = {"true": True, "false": False}.get(str(resume).lower(), resume)
    resumed = [resume] if isinstance(resume, str) else []
    with using_flags(), weights_in(training_args.output_dir, *resumed):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    # The first process may still be saving. The trainer, and with it DDP, is freed before the
    # process group: DDP's destructor would free the group while it holds the interpreter lock, for
    # which a thread of the group may be waiting.
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    del trainer
    accelerator.free_memory()
    accelerator.end_training()
    return 0


def load_datasets(
    script_args: Any, mixture: Any, wants_eval: bool, text_field: str
) -> tuple[Any, Any | None]:
    """Return the training split and, where `wants_eval`, the evaluation split.

    Datasets that the mixture names are used instead of the one of `script_args`. `text_field` is
    the column of plain text.
    """
    from trl import get_dataset

    from onepass_trl.preparation.loading import load_conversations

    if mixture.datasets:
        splits = get_dataset(mixture)
        if wants_eval and script_args.dataset_test_split not in splits:
            raise ValueError(
                f"the run evaluates, but the mixture has only the splits {sorted(splits)}, not "
                f"{script_args.dataset_test_split!r}: set test_split_size (e.g. 0.05), or "
                "eval_strategy no"
            )
        test = splits[script_args.dataset_test_split] if wants_eval else None
        return splits[script_args.dataset_train_split], test
    if not script_args.dataset_name:
        raise ValueError(
            "no dataset: give --dataset_name (Hub name or local file), or `datasets:` in the YAML "
            "file"
        )

    def load(split: str) -> Any:
        return load_conversations(
            script_args.dataset_name,
            split,
            config=script_args.dataset_config,
            streaming=script_args.dataset_streaming,
            text_field=text_field,
        )

    test = load(script_args.dataset_test_split) if wants_eval else None
    return load(script_args.dataset_train_split), test


def _as_flags(arguments: list[str]) -> list[str]:
    """Return `arguments` as `TrlParser` knows them.

    A dataset that comes first becomes ``--dataset_name``. ``--config=FILE`` becomes two arguments,
    and so does ``--accelerate_config=FILE``.
    """
    if arguments and not arguments[0].startswith("-"):
        if any(argument.partition("=")[0] in _DATASET for argument in arguments):
            raise ValueError(
                f"the dataset is named twice, as {arguments[0]!r} and with --dataset_name: leave "
                "out one of them"
            )
        arguments = ["--dataset_name", *arguments]
    flags: list[str] = []
    for argument in arguments:
        flag, is_joined, value = argument.partition("=")
        flags += [flag, value] if is_joined and flag in _FILES else [argument]
    for flag, file in pairwise(flags):
        if flag == "--config":
            _check_config(file)
    return flags


def _parse(parser: Any, flags: list[str], **options: Any) -> Any:
    """Return what the parser makes of flags, and of the YAML file that they may name.

    Raises:
        ValueError: for JSON that can't be read, and for a value of the file that isn't of its
            flag's type: the parser takes any.
    """
    try:
        return parser.parse_args_and_config(flags, **options)
    except json.JSONDecodeError as error:
        raise ValueError(f"a flag has {error.doc[:80]!r}, which isn't JSON: {error}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"a value of the --config file isn't of its flag's type: {error}; `--help` lists them"
        ) from error


def _check_config(file: str) -> None:
    """Raise ValueError unless `file` contains flags: `TrlParser` would not say what is wrong."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--config {file} can't be read: {error.strerror}. Expected a YAML file of flags, such "
            "as examples/sft.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"--config {file} is not YAML: {error}\nExpected a YAML file of flags, such as "
            "examples/sft.yaml"
        ) from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(
            f"--config {file} has {found}, expected one flag per line, such as 'packing: true'"
        )


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """Return `arguments` without `removed`, an ordered subsequence of it."""
    kept, rest = [], list(removed)
    for argument in arguments:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    from onepass_trl.cli import report_errors

    raise SystemExit(report_errors(train, sys.argv[1:]))
