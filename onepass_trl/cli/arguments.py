"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, get_args

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from onepass_trl.chat.json_text import RepeatedKeyError, unique
from onepass_trl.cli import DISK_FULL
from onepass_trl.preparation.options import NullArguments, PreparationOptions, parse_train_on

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from onepass_trl.chat.processing import ProcessingClass

logger = logging.getLogger(__name__)

# What transformers raises for files of a model that hold something else.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    UnicodeDecodeError,
    UnpicklingError,
    json.JSONDecodeError,
)
_LOADERS = ("from_pretrained", "create_model_from_path")
# Functions of transformers' Trainer that make something of flags.
_FLAGS_OF = {
    "add_callback": "--report_to",
    "create_optimizer": "--optim and --optim_args",
    "create_scheduler": "--lr_scheduler_type and --lr_scheduler_kwargs",
}

DATASET_HELP = "dataset of the Hub, a folder, or a .jsonl, .json or .parquet file"


def add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the conversations, the model, and how they are rendered."""
    parser.add_argument("dataset", help=DATASET_HELP)
    parser.add_argument("--model_name_or_path", required=True, help="model of the Hub, or a folder")
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for how a dataset is read and rendered, and which turns are trained."""
    parser.add_argument(
        "--train_on",
        type=trained_turns,
        default="all",
        help="assistant turns to train: 'all', 'last' or a list such as '[0, 2]'",
    )
    parser.add_argument("--dataset_config", help="configuration of the dataset")
    parser.add_argument(
        "--dataset_split", default="train", help="split, or a slice such as train[100:]"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        help="arguments of the chat template as JSON: '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--chat_template_path",
        help="chat template to render with: a .jinja file, or that of another tokenizer",
    )
    parser.add_argument(
        "--null_arguments",
        choices=get_args(NullArguments),
        default="auto",
        help="what a null among a tool call's arguments is: a value to 'keep', a filler to 'drop', "
        "an 'error'; 'auto' keeps it in columns that hold JSON, else it is an error",
    )
    parser.add_argument(
        "--ignored_columns",
        nargs="+",
        metavar="COLUMN",
        default=[],
        help="columns to treat as if the dataset didn't have them, where an error names one that "
        "changes nothing",
    )


def preparation_options(options: argparse.Namespace, **further: Any) -> PreparationOptions:
    """Return how records become rows: as the reading arguments say, and `further` options."""
    return PreparationOptions(
        train_on=options.train_on,
        null_arguments=options.null_arguments,
        ignored_columns=tuple(options.ignored_columns),
        chat_template_kwargs=options.chat_template_kwargs,
        **further,
    )


def load_processing_class(options: argparse.Namespace) -> ProcessingClass:
    """Return the model's processor or tokenizer, with the chat template that the options name.

    The tokens that come with another tokenizer's template are added, as training adds them.
    """
    from transformers import AutoTokenizer

    from onepass_trl.chat import processing

    model, path = options.model_name_or_path, options.chat_template_path
    processing_class: ProcessingClass
    with reading("the tokenizer of", model):
        try:
            processing_class = processing.load_processing_class(model)
        except processing.MissingTorchvisionError as error:
            logger.warning("%s. Until then its tokenizer alone renders conversations", error)
            processing_class = AutoTokenizer.from_pretrained(model)
    if path is None:
        return processing_class
    processing.check_template_source(path, processing_class)
    if path.endswith(processing.TEMPLATE_SUFFIXES):
        processing_class.chat_template = Path(path).read_text(encoding="utf-8")
        return processing_class
    with reading("the tokenizer of", path):
        source = AutoTokenizer.from_pretrained(path)
    tokenizer = processing.tokenizer_of(processing_class)
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    added = source.added_tokens_decoder.values()
    tokenizer.add_tokens([token for token in added if token.content not in known])
    tokenizer.eos_token = source.eos_token
    return tokenizer


@contextmanager
def reading(what: str, model: str, *, among_others: bool = False) -> Iterator[None]:
    """Let what transformers raises for files of a model say which model it is.

    Args:
        what: is read of the model, such as "the tokenizer of".
        model: of the Hub, or a folder.
        among_others: whether more is done than reading files: then errors of the rest stay.

    Raises:
        FileNotFoundError: for a path where nothing is: the Hub would take it for a name.
        ValueError: for damaged files with the first lines of the error, for others with all of it.
    """
    is_path = model.startswith((".", "/")) or model.count("/") > 1
    if is_path and not Path(model).exists():
        raise FileNotFoundError(
            f"there is no model {model!r}: expected a folder, or the name of a model of the Hub"
        )
    try:
        yield
    except _DAMAGED as error:
        calls = traceback.walk_tb(error.__traceback__)
        if among_others and not any(frame.f_code.co_name in _LOADERS for frame, _ in calls):
            raise
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(
            f"{what} {model} can't be read, as a file is damaged or isn't what its name says: "
            f"{type(error).__name__}: {first}"
        ) from error
    except (OSError, ValueError) as error:
        if (name := _name_of_loaded(error)) is None:
            raise
        # What follows is the list of all models.
        text = str(error).partition("\nModel type should be one of")[0]
        raise ValueError(f"{name!r} can't be loaded: {text}") from error


@contextmanager
def using_flags() -> Iterator[None]:
    """Let what transformers raises for values that it can't use say which flags gave them.

    Raises:
        ValueError: with the message of transformers, which says what is wrong or to be installed.
    """
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if flags := _FLAGS_OF.get(frame.f_code.co_name):
                raise ValueError(f"{flags} can't be met: {error}") from error
        raise


@contextmanager
def weights_in(*folders: str) -> Iterator[None]:
    """Let errors of safetensors, which name no file, say where the weights of a training may be.

    Raises:
        OSError: for weights that can't be written, or be read to go on from.
    """
    try:
        yield
    except SafetensorError as error:
        places = " or ".join(folders)
        raise OSError(f"weights in {places} can't be written or read: {error}") from error


def _name_of_loaded(error: OSError | ValueError) -> str | None:
    """Return what was being loaded, if the error doesn't say so. A full disk isn't its fault."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_locals.get("pretrained_model_name_or_path", ""))
        if frame.f_code.co_name in _LOADERS and name and name not in str(error):
            return name
    return None


def fit_vocabulary(config: PreTrainedConfig, processing_class: ProcessingClass) -> None:
    """Give the model an embedding for each token, including those of another chat template."""
    from onepass_trl.chat.processing import tokenizer_of

    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer_of(processing_class)))


def check_outputs(options: argparse.Namespace) -> None:
    """Raise for a file that can't be written, before the work whose result it would get.

    None may replace what is read: the dataset, the model, the chat template.
    """
    from onepass_trl.tools import outputs
    from onepass_trl.tools.plots import check_png

    paths = {f"--{kind}": getattr(options, kind, None) for kind in ("json", "html", "png")}
    if paths["--png"] is not None:
        check_png(paths["--png"])
    inputs = (options.dataset, options.model_name_or_path, options.chat_template_path)
    outputs.check_outputs(paths, inputs)


def load_config(model: str) -> PreTrainedConfig | None:
    """Return the model's configuration, None for a local folder without one."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None
    return read_config(model)


def read_config(model: str) -> PreTrainedConfig:
    """Return the model's configuration."""
    from transformers import AutoConfig

    with reading("the configuration of", model):
        return AutoConfig.from_pretrained(model)


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text, for argparse."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RepeatedKeyError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text[:80]}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text[:80]}")
    return value


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """Return what reads a number of this kind that is not less, for argparse."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:  # so that NaN is refused
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} of at least {least}, got {text}")
        return value

    return read


def trained_turns(text: str) -> Any:
    """Return the value of ``--train_on``, for argparse."""
    try:
        return parse_train_on(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
