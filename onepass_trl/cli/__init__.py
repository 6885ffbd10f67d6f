"""The command `onepass-trl`: one verb per file, imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import itertools
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import NoReturn

from onepass_trl.tools.transcript import visible_text
from onepass_trl.versions import VersionError

# What a shell says of a program that a signal has ended: 128 and its number.
_INTERRUPTED = 130
_OUTPUT_CLOSED = 141
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

VERBS = {
    "sft": "train on conversations in one pass: the flags and YAML files of `trl sft`",
    "setsft": "train several reasoning traces per question, each after its own forking token",
    "verify": "compare one pass with N separate passes on your model and conversations",
    "inspect": "show how a conversation is cut, who sees whom, what is trained and what that saves",
    "estimate": "count what one pass saves on a dataset, and predict how much faster a step is",
    "bench": "time attention and training steps against alternatives, on your machine and data",
    "env": "print versions, attention implementations and devices, for bug reports",
}


class Parser(argparse.ArgumentParser):
    """A parser that shows what it was given as text, also where it would control a terminal."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit with 2."""
        super().error(visible_text(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb named in `argv` (default: the process's arguments); return its exit status.

    0: done; 1: the verb found a difference; 2: the input is wrong, with one message on stderr;
    130: interrupted, with one line on stderr; 141: what reads the output has ended.
    """
    return report_errors(_run, list(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    """Run the verb named in `arguments`; return its exit status."""
    width = max(map(len, VERBS))
    parser = Parser(
        prog="onepass-trl",
        description="Exact one-pass supervised fine-tuning of reasoning models.",
        usage="onepass-trl [-h] [--version] verb ...",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:{width}}  {summary}" for verb, summary in VERBS.items())
        + "\n\n`onepass-trl verb --help` lists the arguments of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("verb", nargs="?", choices=list(VERBS), help=argparse.SUPPRESS)
    # Only what comes before the verb is parsed here: the rest is for the verb's own parser.
    leading = list(itertools.takewhile(lambda argument: argument.startswith("-"), arguments))
    options = parser.parse_args(arguments[: len(leading) + 1])
    if options.version:
        from onepass_trl import __version__

        print(f"onepass-trl {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    verb = importlib.import_module(f"{__name__}.{options.verb}")
    return verb.main(arguments[arguments.index(options.verb) + 1 :])


def report_errors(verb: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Return the exit status of ``verb(arguments)``: see `main`.

    ONEPASS_DEBUG=1 lets errors through, with their tracebacks.
    """
    try:
        try:
            return verb(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of several processes that train says it
            print("\nonepass-trl: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # What is still to be written, at the latest when Python ends, has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OUTPUT_CLOSED
    except _errors_of_input() as error:
        if os.environ.get("ONEPASS_DEBUG") == "1":
            raise
        message = visible_text(f"{error}{_places_of_files(error)}") or type(error).__name__
        print(f"onepass-trl: error: {message}\n(ONEPASS_DEBUG=1 shows where)", file=sys.stderr)
        return 2


def _places_of_files(error: Exception) -> str:
    """Return where files may have been written if a disk is full, and the error doesn't say which.

    Arrow's errors don't.
    """
    if not isinstance(error, OSError) or error.errno not in DISK_FULL or error.filename is not None:
        return ""
    places = f"temporary files in {tempfile.gettempdir()} (TMPDIR), outputs where flags say"
    if datasets := sys.modules.get("datasets"):
        cache = datasets.config.HF_DATASETS_CACHE
        places = f"prepared datasets are written in {cache} (HF_DATASETS_CACHE), {places}"
    return f": make room, or choose another folder; {places}"


def _errors_of_input() -> tuple[type[Exception], ...]:
    """Return the errors that say something about the input or the machine, not about the code."""
    # A package that has raised its error is imported; the others may be broken.
    of_packages = (
        getattr(sys.modules[package], error)
        for package, error in (
            ("onepass_trl.attention", "ExtensionNotBuiltError"),
            ("safetensors", "SafetensorError"),
        )
        if package in sys.modules
    )
    return (
        ValueError,
        OSError,
        EOFError,
        MemoryError,
        RecursionError,
        FloatingPointError,
        ImportError,
        pickle.UnpicklingError,
        VersionError,
        *of_packages,
    )
