"""Draws the figures of docs/figures: from the JSON of results/, and one of a conversation.

make plots
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onepass_trl.tools import mask_picture
from onepass_trl.tools.inspection import inspect_record
from onepass_trl.tools.plots import N_PASS, ONE_PASS, PEER, check_png, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
GREY, GRID = "#4b5563", "#e5e7eb"
FLOAT32_EPSILON = 2**-23
_RIGHT: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 10}


def speedup_by_turns(run: dict[str, Any]) -> Figure:
    """Draw the speed-up of one pass together with the ratio of tokens."""
    results = run["results"]
    turns = [result["turns"] for result in results]
    figure, axes = _begin("A training step in one pass, against N-pass", run)
    ratio, speedup = ([result[name] for result in results] for name in ("token_ratio", "speedup"))
    axes.plot(turns, ratio, color=PEER, lw=1.5, zorder=2)
    axes.plot(turns, speedup, "o", color=ONE_PASS, ms=7, zorder=3)
    axes.set(xlabel="turns of the chat", xticks=turns, xlim=(0, max(turns) * 1.04))
    axes.set_ylim(0, max(ratio + speedup) * 1.12)
    axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter("{x:g} x")
    # Both grow with the number of turns, so this corner is free.
    for height, text, colour in (
        (0.93, "●  time of N-pass / time of one pass", ONE_PASS),
        (0.85, "—  tokens of N-pass / tokens of one pass", PEER),
    ):
        axes.text(0.02, height, text, color=colour, fontsize=10.5, transform=axes.transAxes)
    return figure


def memory_by_tokens(run: dict[str, Any]) -> Figure:
    """Draw the peak memory of attention against the length of the row."""
    names = {  # and by how many points the name is above the end of its line
        "onepass cpu": ("one pass", ONE_PASS, "o-", 5),
        "flex": ("FlexAttention", PEER, "s--", -13),
        "sdpa dense mask": ("SDPA, dense mask", PEER, "D-", 0),
    }
    figure, axes = _begin("Peak memory of attention, forward and backward", run)
    for key, (name, colour, style, above) in names.items():
        results = [
            result
            for result in run["results"]
            if result["implementation"] == key and result["peak_mib"] is not None
        ]
        if not results:
            continue
        if not results[0]["backward"]:
            name += ", forward\n(no backward on a CPU)"
        x, y = [result["seq"] for result in results], [result["peak_mib"] for result in results]
        axes.plot(x, y, style, color=colour, ms=5, lw=1.5)
        axes.annotate(
            name,
            (x[-1], y[-1]),
            xytext=(8, above),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10,
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of the row")
    ticks = sorted({result["seq"] for result in run["results"]})
    axes.set_xticks(ticks, [f"{tick / 1000:.3g}k" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] * 0.85, ticks[-1] * 5)  # room for the names
    sizes = [(2**i, f"{2**i} MiB" if i < 10 else f"{2 ** (i - 10)} GiB") for i in range(2, 20, 2)]
    low, high = axes.get_ylim()
    shown = [(size, text) for size, text in sizes if low <= size <= high]
    axes.set_yticks([size for size, _ in shown], [text for _, text in shown])
    return figure


def loss_curves(run: dict[str, Any]) -> Figure:
    """Draw the losses of both ways in one plot, and below it their difference."""
    results = run["results"]
    steps = [result["step"] for result in results]
    n_pass, one_pass = ([result[f"{way}_pass_loss"] for result in results] for way in ("n", "one"))
    figure = new_figure(7.2, 5.6)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (losses, differences):
        _clean(axes)
    _caption(figure, losses, "A training run in N passes and in one", run)
    losses.plot(steps, n_pass, color=N_PASS, lw=5, alpha=0.55, solid_capstyle="round")
    losses.plot(steps, one_pass, color=ONE_PASS, lw=1.3)
    losses.set_ylabel("loss of the step")
    for height, text, colour in (
        (0.92, "N-pass (wide line)", N_PASS),
        (0.83, "one pass (thin line)", ONE_PASS),
    ):
        losses.text(0.98, height, text, color=colour, transform=losses.transAxes, **_RIGHT)
    apart = [(step, abs(one / n - 1)) for step, one, n in zip(steps, one_pass, n_pass, strict=True)]
    apart = [(step, difference) for step, difference in apart if difference > 0]  # a log axis
    differences.plot(*zip(*apart, strict=True), ".", color=ONE_PASS, ms=4)
    differences.axhline(FLOAT32_EPSILON, color=PEER, lw=1, ls="--")
    text = "dashed: rounding of float32, 2^-23"
    differences.text(0.98, 0.08, text, color=PEER, transform=differences.transAxes, **_RIGHT)
    differences.set(yscale="log", xlabel="step", ylabel="relative difference")
    differences.set_ylim(bottom=min(difference for _, difference in apart) / 4)
    differences.minorticks_off()
    return figure


def mask_of_a_conversation() -> Figure:
    """Draw who sees whom in the longest conversation of examples/conversations.jsonl."""
    sys.path.append(str(HERE.parent / "examples"))
    from small_model import make_tokenizer, read_conversations

    conversations = read_conversations()
    tokenizer = make_tokenizer(conversations)
    inspected = (inspect_record(conversation, tokenizer) for conversation in conversations)
    longest = max(inspected, key=lambda found: len(found.pass_lengths) * 10**6 + len(found.row))
    return mask_picture.draw(longest, "A conversation of examples/conversations.jsonl")


FIGURES = {
    "turns": ("speedup_by_turns", speedup_by_turns),
    "memory": ("memory_by_tokens", memory_by_tokens),
    "loss_curves": ("loss_curves", loss_curves),
}


def source_of(run: dict[str, Any]) -> str:
    return f"{run['name']} at {run['commit']}, {run['date']}"


def _begin(title: str, run: dict[str, Any]) -> tuple[Figure, Axes]:
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    _clean(axes)
    _caption(figure, axes, title, run)
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0, labelsize=10)
    axes.xaxis.label.set(color=GREY, size=10.5)
    axes.yaxis.label.set(color=GREY, size=10.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")


def _caption(figure: Figure, axes: Axes, title: str, run: dict[str, Any]) -> None:
    """Write the title, and below the figure what it was measured on."""
    machine = run["machine"]
    device = machine["accelerator"] or f"{machine['cpu']}, {machine['threads']} threads"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
    figure.supxlabel(
        f"{device}; torch {run['versions']['torch']}; commit {run['commit']}; "
        f"{run['date']}; results/{run['name']}.json",
        fontsize=7.5,
        color="#6b7280",
        x=0.99,
        ha="right",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to read")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "figures")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (file, draw) in FIGURES.items():
        path = args.output / f"{file}.png"
        check_png(path)
        source = args.results / f"{name}.json"
        if not source.is_file():
            raise SystemExit(f"{source} is missing: run benchmarks/bench_{name}.py --json {source}")
        run = json.loads(source.read_text())
        save(draw(run), path, source_of(run))
        print(f"wrote {path}")
    path = args.output / "mask.png"
    save(mask_of_a_conversation(), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
