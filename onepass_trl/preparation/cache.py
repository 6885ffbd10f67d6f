"""What the caches of `datasets` must not outlive."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path


@cache
def code_digest() -> str:
    """Return a digest of this package's Python code, which made what a cache holds."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def files_digest(files: Iterable[str]) -> str:
    """Return a digest of where files are and of their content.

    A time and a size don't tell files apart: archives set all times alike.
    """
    digest = sha256()
    for file in files:
        digest.update(os.fsencode(Path(file).resolve()) + b"\0")
        with open(file, "rb") as content:
            digest.update(file_digest(content, "sha256").digest())
    return digest.hexdigest()
