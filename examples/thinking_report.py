"""The results of thinking_survives.py as a table and as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onepass_trl.tools import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_TURNS, LAST_TURN = "one rendering, all turns", "one rendering, last turn"
KEPT, N_PASS, ONE_PASS = "all reasoning kept", "one record per turn", "one pass"
CONVERSATIONS, TOKENS = "conversations", "tokens"  # of which all ways have had equally many
SHARES = ("thinks", "well_formed", "right")
_STYLES = {
    ALL_TURNS: ("#b91c1c", "s-"),
    LAST_TURN: (plots.PEER, "^-"),
    KEPT: ("#7c3aed", "D-"),
    N_PASS: (plots.N_PASS, "-"),
    ONE_PASS: (plots.ONE_PASS, "o-"),
}

Results = Sequence[dict[str, Any]]  # of `thinking_survives.run`, one for each seed


def summarize(results: Results) -> list[dict[str, str]]:
    """Return a row for each way and measure of equality: means, and least and most over seeds."""
    rows = [{"after equally many": "", "way": "before", **_shares([r["before"] for r in results])}]
    for equal in (CONVERSATIONS, TOKENS):
        for way in results[0]["ways"]:
            found = [result["ways"][way][equal] for result in results]
            spent = {
                name: f"{np.mean([f[name] for f in found]):,.0f}"
                for name in ("conversations", "tokens", "seconds")
            }
            rows.append({"after equally many": equal, "way": way, **spent, **_shares(found)})
    return rows


def _shares(found: Sequence[dict[str, list[float]]]) -> dict[str, str]:
    texts = {}
    for name in SHARES:
        means = np.mean([shares[name] for shares in found], axis=1)  # over the turns
        texts[name] = f"{means.mean():.2f} ({means.min():.2f} to {means.max():.2f})"
    return texts


def report(results: Results) -> Iterator[str]:
    """Yield the results as lines of text."""
    rows = summarize(results)
    columns = list(rows[-1])
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
    for result in results:
        difference = result["difference"]
        yield (
            f"seed {result['seed']}, {ONE_PASS} against {N_PASS}: loss of the first step "
            f"{difference['first_loss']:.1e} apart, of any step {difference['largest_loss']:.1e}; "
            f"weights {difference['weights']:.1e}"
        )


def draw(results: Results) -> Figure:
    """Return a figure: in which turns each way's model thinks, and in which it is right."""
    figure = plots.new_figure(9, 3.8)
    titles = {"thinks": "share of turns with reasoning", "right": "share of right answers"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        _draw_by_turn(axes, results, name)
        axes.set(title=title, xlabel="turn", ylim=(-0.03, 1.03))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="outside lower center")
    return figure


def _draw_by_turn(axes: Axes, results: Results, name: str) -> None:
    for way, (colour, style) in _STYLES.items():
        shares = np.array([result["ways"][way][CONVERSATIONS][name] for result in results])
        turns = np.arange(1, shares.shape[1] + 1)
        width = 5 if way == N_PASS else 1.5
        axes.plot(turns, shares.mean(axis=0), style, color=colour, lw=width, ms=5, label=way)
        spread = shares.min(axis=0), shares.max(axis=0)
        axes.fill_between(turns, *spread, color=colour, alpha=0.15, lw=0)
