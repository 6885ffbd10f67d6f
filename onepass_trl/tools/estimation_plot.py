"""An estimate as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onepass_trl.tools import plots
from onepass_trl.tools.estimation import Estimate
from onepass_trl.tools.estimation_report import PARTS, turn_bins
from onepass_trl.tools.single_rendering import Training
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


def draw(found: Estimate, title: str) -> Figure:
    """Return a figure of what a dataset contains and what one pass saves on it."""
    figure = plots.new_figure(10, 9.5 if found.has_reasoning else 7)
    figure.suptitle(title)
    below: Figure | SubFigure = figure
    if found.has_reasoning:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.5, 7))[:, 0]
        _draw_ways(above, found.single_rendering)
    axes = below.subplots(2, 2)
    _draw_turns(axes[0, 0], found)
    _draw_lengths(axes[0, 1], found)
    _draw_savings(axes[1, 0], found)
    _draw_operations(axes[1, 1], found)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[0]:
        ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_ways(figure: SubFigure, ways: Mapping[str, Training]) -> None:
    """Draw how one rendering of each conversation would train the turns, and how one pass does."""
    turns = next(iter(ways.values())).turns
    rows = {f"one rendering, {way}": made for way, made in ways.items()}
    rows["one pass"] = Training(turns, faithful=turns)
    parts = {
        "as at inference": (plots.ONE_PASS, [made.faithful for made in rows.values()]),
        "not at all": (plots.PEER, [made.untrained for made in rows.values()]),
        "without their reasoning": (plots.UNREASONED, [m.unreasoned for m in rows.values()]),
        "with it, in a context that inference never gives": (
            plots.DISPLACED,
            [
                made.turns - made.faithful - made.untrained - made.unreasoned
                for made in rows.values()
            ],
        ),
    }
    ax = figure.subplots()
    left = np.zeros(len(rows))
    for label, (color, counts) in parts.items():
        bars = ax.barh(list(rows), counts, left=left, color=color, label=label)
        ax.bar_label(bars, [f"{n:,}" if n else "" for n in counts], label_type="center", color="w")
        left += counts
    ax.invert_yaxis()
    ax.set_title(f"how {counted(turns, 'turn')} would be trained")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=4, loc="outside lower center")


def _draw_turns(ax: Any, found: Estimate) -> None:
    bins = turn_bins(found.num_turns.tolist())
    ax.bar(list(bins), list(bins.values()), color=plots.ONE_PASS)
    ax.set_title("trained turns of a conversation")
    ax.set_ylabel("conversations")


def _draw_lengths(ax: Any, found: Estimate) -> None:
    from matplotlib.ticker import EngFormatter

    lengths = found.longest_path[found.longest_path > 0]
    edges = np.geomspace(lengths.min(), lengths.max() + 1, 25)
    ax.hist(lengths, bins=edges, color=plots.ONE_PASS)
    ax.set_xscale("log")
    for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        axis(EngFormatter(sep=""))
    ax.set_title("longest turn of a conversation with its context")
    ax.set_xlabel("tokens")
    ax.set_ylabel("conversations")
    if found.max_length is not None:
        ax.axvline(found.max_length, color="black", linewidth=1, linestyle="--")
        ax.annotate(
            "max_length",
            (found.max_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
        )


def _draw_savings(ax: Any, found: Estimate) -> None:
    left = found.row_tokens > 0
    ratios = found.n_pass_tokens[left] / found.row_tokens[left]
    ax.scatter(found.num_turns[left], ratios, s=10, alpha=0.5, color=plots.ONE_PASS)
    ax.set_title(f"N-pass computes {found.token_ratio:.2f} times the tokens")
    ax.set_xlabel("trained turns")
    ax.set_ylabel("N-pass tokens / one-pass tokens")
    ax.set_ylim(bottom=0)


def _draw_operations(ax: Any, found: Estimate) -> None:
    if found.cost is None:
        ax.axis("off")
        ax.text(0.5, 0.5, "no configuration of a model:\noperations unknown", ha="center")
        return
    ways = [found.flops(work) for work in (found.n_pass, found.one_pass)]
    from matplotlib.ticker import EngFormatter

    bottom = np.zeros(2)
    colors = (plots.ONE_PASS, plots.N_PASS, plots.PEER)
    for (part, name), color in zip(PARTS.items(), colors, strict=True):
        values = np.array([way[part] for way in ways])
        ax.bar(["N-pass", "one pass"], values, bottom=bottom, color=color, label=name)
        bottom += values
    ax.set_title(f"operations, {found.cost.name}: {found.flops_ratio:.2f} times")
    ax.yaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    ax.set_ylabel("forward and backward")
    ax.legend(frameon=False)
