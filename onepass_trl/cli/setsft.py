"""`onepass-trl setsft`: set supervised fine-tuning, with the flags, YAML and launcher of `sft`.

Other ways to launch it: ``accelerate launch -m onepass_trl.cli.setsft ...`` or
``torchrun -m onepass_trl.cli.setsft ...``.
"""

from __future__ import annotations

import sys
from typing import Any

from onepass_trl.cli.sft import launch, parser_of, run


def main(argv: list[str]) -> int:
    """Launch the training named by `argv` through accelerate and return its exit status."""
    return launch(argv, make_parser(), "onepass_trl.cli.setsft")


def make_parser() -> Any:
    """Return the `TrlParser` of `onepass-trl sft`, with `SetSFTConfig`."""
    from onepass_trl.setsft import SetSFTConfig

    return parser_of(SetSFTConfig, "setsft")


def train(argv: list[str]) -> int:
    """Train in this process, as `argv` says; return 0."""
    from onepass_trl.setsft import SetSFTTrainer

    return run(argv, make_parser(), SetSFTTrainer)


if __name__ == "__main__":
    from onepass_trl.cli import report_errors

    raise SystemExit(report_errors(train, sys.argv[1:]))
