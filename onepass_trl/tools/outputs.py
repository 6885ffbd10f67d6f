"""Files that a verb writes: checked before the work, and replaced whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

# What is read of a model's folder without its weights.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | None] = ()) -> None:
    """Raise for outputs that can't be written, or would replace an input or one another.

    Args:
        outputs: paths by flag; None is no output.
        inputs: what is read: files, patterns of files, folders (of data, or of a model); names of
            the Hub and None are ignored.

    Raises:
        OSError: if the folder of an output doesn't exist, or the output is a folder.
        ValueError: if an output is an input, or two are the same file.
    """
    given = {flag: path for flag, path in outputs.items() if path is not None}
    sources = [file for source in inputs if source for file in _files(source)]
    taken: dict[Path, str] = {}
    for flag, path in given.items():
        file = Path(path).resolve()
        if not file.parent.is_dir():
            raise FileNotFoundError(
                f"{flag} {path}: the folder {file.parent} does not exist; create it first"
            )
        if file.is_dir():
            raise IsADirectoryError(f"{flag} {path} is a folder, name a file in it")
        if file.exists():
            for source in sources:
                if source.exists() and file.samefile(source):
                    raise ValueError(
                        f"{flag} {path} would replace {source}, which is read; name another file"
                    )
        if file in taken:
            raise ValueError(f"{taken[file]} and {flag} both name {path}; name two files")
        taken[file] = flag


def check_output_folder(path: str) -> None:
    """Raise OSError unless a folder is there, or can be made, and takes files."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"no files can be written to --output_dir {path}: {error.strerror}"
        ) from error


def _files(source: str) -> list[Path]:
    path = Path(source)
    if (path / "config.json").is_file():
        return [path / name for name in _MODEL_FILES]
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path, *map(Path, glob.glob(source, recursive=True))]


def write_output(path: str | Path, content: str | bytes) -> None:
    """Write a file aside and move it into place, so that a failure leaves what was there.

    A link stays a link. A pipe or a device is written to.

    Raises:
        OSError: if it can't be written; the message names the file.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except OSError as error:
        raise OSError(
            f"{path} can't be written, and is left as it was: {error.strerror}"
        ) from error


def _replace(target: Path, data: bytes) -> None:
    aside = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
