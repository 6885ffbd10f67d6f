"""The command `onepass-trl`: one verb per file, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

VERBS = {
    "sft": "train on conversations in one pass: the flags and YAML files of `trl sft`",
    "setsft": "train several reasoning traces per question, each after its own forking token",
    "verify": "compare one pass with N separate passes on your model and conversations",
    "inspect": "show how a conversation is cut, who sees whom, what is trained and what that saves",
    "estimate": "count what one pass saves on a dataset, and predict how much faster a step is",
    "bench": "time attention and training steps against alternatives, on your machine and data",
    "env": "print versions, attention implementations and devices, for bug reports",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb named in `argv` (default: the process's arguments); return its exit status.

    0: done; 1: the verb found a difference; 2: the input is wrong, with one message on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
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
    options = parser.parse_args(arguments[: 1 + _num_leading_options(arguments)])
    if options.version:
        from onepass_trl import __version__

        print(f"onepass-trl {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    verb = importlib.import_module(f"{__name__}.{options.verb}")
    return report_errors(verb.main, arguments[arguments.index(options.verb) + 1 :])


def report_errors(verb: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Return the exit status of ``verb(arguments)``; wrong input gives one message on stderr and 2.

    ONEPASS_DEBUG=1 lets the error through, with its traceback.
    """
    try:
        return verb(arguments)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("ONEPASS_DEBUG") == "1" or not _is_about_input(error):
            raise
        message = str(error) or type(error).__name__
        print(f"onepass-trl: error: {message}\n(ONEPASS_DEBUG=1 shows where)", file=sys.stderr)
        return 2


def _is_about_input(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return True
    from onepass_trl.attention import ExtensionNotBuiltError

    return isinstance(error, ExtensionNotBuiltError)


def _num_leading_options(arguments: list[str]) -> int:
    for index, argument in enumerate(arguments):
        if not argument.startswith("-"):
            return index
    return len(arguments)
