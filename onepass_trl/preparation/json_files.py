"""The records of a local file of JSON, and which of them can't be read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from onepass_trl.chat.json_text import RepeatedKeyError, unique

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_LISTS = tuple(".json" + packing for packing in ("", *_OPENERS))
JSON_SUFFIXES = (
    *(kind + packing for kind in (".jsonl", ".ndjson") for packing in ("", *_OPENERS)),
    *_LISTS,
)
"""How the names of files of JSON end."""
UNREADABLE = "unreadable record"
"""The only column of a record that can't be read: where it is, and why."""
NOT_TEXT = "columns without text"
"""The column that lists those of a record in which text is expected and something else is."""

_LARGEST_RATIO = 200
_LEAST_LIMIT = 2**30

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(file: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file: the objects of its lines, or those of one JSON list.

    A record that can't be read comes as its column `UNREADABLE`, so that it can be left out.

    Raises:
        ValueError: if the file is damaged, or holds something else; with the file and the line.
    """
    lines: Iterable[str] = _lines(file)
    if file.lower().endswith(_LISTS):
        text = "".join(lines)
        if text.lstrip().startswith("["):
            for number, element in enumerate(_parsed(text, file)):
                yield _as_record(element, f"{file}, element {number}", text)
            return
        lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = _parsed(line, where)
        except _UnreadableError as error:
            value = {UNREADABLE: str(error)}
        yield _as_record(value, where, line)


def not_text(record: Mapping[str, Any], text_field: str) -> list[str]:
    """Return the columns in which text is expected and something else is.

    >>> not_text({"text": ["a"], "prompt": [{"role": "user", "content": "Hi"}], "id": 5}, "text")
    ['text']
    """
    found = [column for column in (text_field, "system") if _is_other(record.get(column))]
    for column in ("prompt", "completion"):
        value = record.get(column)
        is_messages = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        if _is_other(value) and not is_messages and column != text_field:
            found.append(column)
    return found


def _is_other(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


class _UnreadableError(ValueError):
    """JSON that Python can't hold, or holds in part."""


def _lines(file: str) -> Iterator[str]:
    """Yield the lines of a file, unpacked."""
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}, line {number} is not text in UTF-8: {error}; convert it"
        ) from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system says why it can't be read, such as a missing permission
        raise ValueError(f"{file} is cut off or damaged after line {number}: {error}") from None


def _open(file: str) -> IO[bytes]:
    opener = _OPENERS.get(Path(file).suffix.lower())
    if opener is None:
        return open(file, "rb")
    return cast(IO[bytes], io.BufferedReader(_Unpacked(opener(file, "rb"), file)))


class _Unpacked(io.RawIOBase):
    """The content of a packed file, up to a size beyond which no file of conversations goes."""

    def __init__(self, content: IO[bytes], file: str) -> None:
        self._content, self._file = content, file
        self._limit = max(_LEAST_LIMIT, _LARGEST_RATIO * os.path.getsize(file))
        self._num_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._content.readinto(buffer)  # type: ignore[attr-defined]
        self._num_read += size
        if self._num_read > self._limit:
            raise ValueError(
                f"{self._file} holds more than {self._limit} bytes, over {_LARGEST_RATIO} times "
                "its own size: if that is right, unpack it first"
            )
        return size

    def close(self) -> None:
        self._content.close()
        super().close()


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: {error}. A file has one object a line, or, as .json, one list "
            "of objects"
        ) from None
    except RecursionError:
        raise _UnreadableError(f"{where} is nested too deep to be read; make it flatter") from None
    except RepeatedKeyError as error:
        raise _UnreadableError(f"{where} has {error}") from None
    except ValueError:  # the only other one is that of a long integer
        raise _UnreadableError(
            f"{where} has a number of more than {sys.get_int_max_str_digits()} digits, which can't "
            "be read; give it as text"
        ) from None


def _as_record(value: Any, where: str, text: str) -> dict[str, Any]:
    """Return the record that a value of a text is."""
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} must be a JSON object with the columns of a row, got {type(value).__name__}"
        )
    if _SURROGATE.search(text):  # else there can't be a lone one
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            problem = f"{where} has an unpaired surrogate, which no tokenizer encodes; remove it"
            return {UNREADABLE: problem}
    return value
