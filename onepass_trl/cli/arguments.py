"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DATASET_HELP = "dataset of the Hub, or a .jsonl, .json or .parquet file"


def add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which conversations, for which model, rendered how."""
    parser.add_argument("dataset", help=DATASET_HELP)
    parser.add_argument("--model_name_or_path", required=True, help="model of the Hub, or a folder")
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a dataset is read and rendered, and what of it is trained."""
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


def check_folder(flag: str, path: str | None) -> None:
    """Raise for an output that can't be written: before the work that it would hold.

    Raises:
        FileNotFoundError: if the folder of `path` doesn't exist; None is no output.
    """
    if path is not None and not (folder := Path(path).resolve().parent).is_dir():
        raise FileNotFoundError(f"{flag} {path}: there is no folder {folder}, make it first")


def load_config(model: str) -> PreTrainedConfig | None:
    """Return the model's configuration, None for a local folder without one."""
    from transformers import AutoConfig

    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None
    return AutoConfig.from_pretrained(model)


def json_object(text: str) -> dict[str, Any]:
    """Return the object that the text is, for argparse."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def trained_turns(text: str) -> Any:
    """Return what ``--train_on`` means, for argparse."""
    from onepass_trl.training.config import parse_train_on

    try:
        return parse_train_on(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
