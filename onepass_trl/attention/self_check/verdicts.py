"""What checks have found, remembered per user, and at most one check of a kernel at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

logger = logging.getLogger(__name__)

Outcome = Literal["passed", "failed", "not run"]
LONGEST_WAIT = 300.0
"""Seconds that a process waits for the check of another, which takes less."""
_POLL = 0.1  # seconds


class Verdict(NamedTuple):
    """What a check has found."""

    outcome: Outcome
    detail: str = ""
    """What is wrong, or why the check couldn't run."""


class Subject(NamedTuple):
    """What a verdict is about: another driver or library may be right where this one is wrong."""

    device: str
    capability: tuple[int, int]
    driver: str
    torch: str
    package: str
    library: str
    """Digest of the file."""
    family: str
    """ONEPASS_CUDA_FAMILY, which forces kernels."""
    dtype: str
    head_dims: tuple[int, int]


class _Entry(NamedTuple):
    verdict: Verdict
    time: float
    """When it was written, in seconds since the epoch."""


def recall(subject: Subject) -> Verdict | None:
    """Return the verdict on a subject that is remembered, None if there is none."""
    try:
        entry = _read(_path(subject), subject)
    except OSError:
        return None
    return entry.verdict if entry is not None and _lasts(entry.verdict) else None


def check_once(subject: Subject, check: Callable[[], Verdict], *, again: bool = False) -> Verdict:
    """Return the verdict on a subject: what is remembered, else what `check` finds.

    Processes that ask meanwhile wait and get the same, also that the check couldn't run, which
    nobody else is told. A process that dies lets go of its lock. Where nothing can be written, each
    process checks for itself, with a warning.

    Args:
        subject: what is checked.
        check: takes less than `LONGEST_WAIT`.
        again: whether to check even if a verdict is remembered.
    """
    since = time.time()
    if not again and (known := recall(subject)) is not None:
        return known
    with contextlib.ExitStack() as stack:
        try:
            path = _path(subject)
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path.with_suffix(".lock")))
        except TimeoutError as error:
            return Verdict("not run", str(error))
        except OSError as error:
            logger.warning(
                "what a check of attention kernels finds can't be remembered (%s), so each process "
                "checks for itself: set XDG_CACHE_HOME to a folder that it can write to",
                error,
            )
            return check()
        entry = _read(path, subject)
        if entry is not None and (entry.time >= since or (not again and _lasts(entry.verdict))):
            return entry.verdict
        verdict = check()
        _write(path, subject, _Entry(verdict, time.time()))
        return verdict


def _lasts(verdict: Verdict) -> bool:
    """What kept a check from running may be gone the next time."""
    return verdict.outcome != "not run"


def _path(subject: Subject) -> Path:
    """Return the file of a subject; raises OSError if there is no folder for it."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the specification has it
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        raise OSError("the user has no home folder")
    digest = hashlib.sha256(json.dumps(subject).encode()).hexdigest()
    return Path(cache, "onepass-trl", "self_check", f"{digest[:16]}.json")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process.

    Raises TimeoutError after `LONGEST_WAIT`, and OSError where files can't be locked.
    """
    import fcntl  # not everywhere, nor is the CUDA library

    with path.open("a") as file:
        deadline = time.monotonic() + LONGEST_WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {path} for too long") from None
                time.sleep(_POLL)
        yield


def _read(path: Path, subject: Subject) -> _Entry | None:
    """Return the entry of a file, None if there is none or it can't be understood."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        entry = json.loads(content)
        if entry["subject"] != json.loads(json.dumps(subject._asdict())):
            raise ValueError("it is about something else")
        if entry["outcome"] not in get_args(Outcome):
            raise ValueError(f"its outcome is {entry['outcome']!r}")
        return _Entry(Verdict(entry["outcome"], str(entry["detail"])), float(entry["time"]))
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be understood (%r): the kernels are checked again", path, error)
        return None


def _write(path: Path, subject: Subject, entry: _Entry) -> None:
    content = {"subject": subject._asdict(), **entry.verdict._asdict(), "time": entry.time}
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning("what a check of attention kernels found can't be remembered: %s", error)
