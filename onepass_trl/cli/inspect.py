"""`onepass-trl inspect`: one conversation as trunk and branches, as text, page or picture."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onepass_trl.cli import Parser
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from onepass_trl.tools.flops import AttentionLayers
    from onepass_trl.tools.inspection import Inspection, Segment

_SHOWN = 100  # characters of a text, at most


def main(argv: list[str]) -> int:
    """Show the record that `argv` names; return 0."""
    options = _parse(argv)
    from rich.console import Console

    from onepass_trl.tools.inspection_report import figures, remarks
    from onepass_trl.tools.transcript import visible_text

    layers, problems, no_images = _model(options.model_name_or_path)
    found = _inspect(options, layers)
    if no_images and found.images:
        problems.append(f"Training would stop: {no_images}")
    # rich reads COLUMNS from the environment as it was when rich was imported.
    console = Console(highlight=False, width=shutil.get_terminal_size().columns)
    console.print(as_tree(found))
    for line in [*figures(found, layers), *remarks(found), *problems]:
        console.print(line, markup=False, soft_wrap=True)
    if options.html is not None:
        from onepass_trl.tools.outputs import write_output
        from onepass_trl.tools.page import to_html

        write_output(options.html, to_html(found, _title(options), layers))
        console.print(f"Wrote {visible_text(options.html)}", markup=False, soft_wrap=True)
    if options.png is not None:
        from onepass_trl.tools import mask_picture, plots

        plots.save(mask_picture.draw(found, _title(options)), options.png)
        console.print(f"Wrote {visible_text(options.png)}", markup=False, soft_wrap=True)
    return 0


def _title(options: argparse.Namespace) -> str:
    from onepass_trl.tools.transcript import visible_text

    path = Path(options.dataset)
    name = path.name if path.is_file() else options.dataset
    return f"{visible_text(name)}, row {options.row}"


def _parse(argv: list[str]) -> argparse.Namespace:
    from onepass_trl.cli.arguments import add_conversation_arguments, check_outputs

    parser = Parser(
        prog="onepass-trl inspect",
        description="Show how a conversation is cut: the trunk that later turns see and the branch "
        "of each turn, which tokens are trained, and how much less one pass computes than N "
        "separate passes. Turns, messages and positions count from 0. Needs a tokenizer but no "
        "weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_conversation_arguments(parser)
    parser.add_argument("--row", type=int, default=0, help="which record, from 0")
    parser.add_argument("--html", metavar="FILE", help="also write one self-contained page")
    parser.add_argument(
        "--png", metavar="FILE", help="also draw who sees whom (needs matplotlib, no display)"
    )
    options = parser.parse_args(argv)
    check_outputs(options)
    return options


def _inspect(options: argparse.Namespace, layers: Sequence[AttentionLayers]) -> Inspection:
    from onepass_trl.cli.arguments import load_processing_class, preparation_options
    from onepass_trl.cli.conversations import naming_record, open_dataset
    from onepass_trl.tools.inspection import inspect_record

    dataset = open_dataset(options)
    if not 0 <= options.row < len(dataset):
        raise ValueError(
            f"--row {options.row} is out of range: split {options.dataset_split!r} of "
            f"{options.dataset!r} has {counted(len(dataset), 'row')}, 0..{len(dataset) - 1}"
        )
    processing_class = load_processing_class(options)
    preparation = preparation_options(options)
    with naming_record(options.row):
        return inspect_record(
            dataset[options.row],
            processing_class,
            preparation,
            features=dataset.features,
            layers=layers,
        )


def _model(name: str) -> tuple[Sequence[AttentionLayers], list[str], str | None]:
    """Return a model's attention layers, what keeps them unknown, and why it can't have images.

    All of them are empty without a config.
    """
    from onepass_trl.attention.image_models import why_no_images
    from onepass_trl.cli.arguments import load_config, reading
    from onepass_trl.tools.flops import model_cost

    no_images = None
    try:
        config = load_config(name)
        if config is None:
            return [], [], None
        no_images = why_no_images(config)
        with reading("the configuration of", name):
            return model_cost(config).attention, [], no_images
    except (ValueError, OSError) as error:  # the conversation can still be shown
        return [], [f"The model's layers aren't known: {error}"], no_images


def as_tree(found: Inspection) -> Tree:
    """Return the conversation's outline: its trunk, with each branch where it leaves."""
    from rich.text import Text
    from rich.tree import Tree

    from onepass_trl.tools.inspection import Branch
    from onepass_trl.tools.inspection_report import name_of

    root = Tree(Text("trunk", style="bold"))
    waiting = [(root, found.trunk)]
    while waiting:
        tree, branch = waiting.pop()
        for item in branch.items:
            if isinstance(item, Branch):
                waiting.append((tree.add(Text(name_of(item), style="bold")), item))
            else:
                tree.add(_line(found, item))
    return root


def _line(found: Inspection, segment: Segment) -> Text:
    from rich.text import Text

    from onepass_trl.tools.transcript import visible_text

    number = "" if segment.message < 0 else f" {segment.message}"
    text = "".join(
        text
        for text, is_copy in zip(
            found.texts[segment.begin : segment.end],
            found.is_copy[segment.begin : segment.end],
            strict=True,
        )
        if not is_copy
    )
    if segment.image >= 0:
        text += f" {found.images[segment.image]}"
    what, colour = ("trained", "green") if segment.trained else ("context", "blue")
    return Text.assemble(
        (f"{segment.role}{number}", "bold"),
        f"  {segment.size}  ",
        # If messages aren't known, the role already says this.
        *(() if what == segment.role else ((what, colour), "  ")),
        _shortened(visible_text(text)),
        no_wrap=True,
        overflow="ellipsis",
    )


def _shortened(text: str) -> str:
    return text[:_SHOWN].replace("\n", "⏎").replace("\t", " ") + "…" * (len(text) > _SHOWN)
