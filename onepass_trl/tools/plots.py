"""Figures as PNG files, if matplotlib is installed. No display is needed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from onepass_trl.tools.outputs import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour for each way to train, in every figure; distinct in grey and to the colour-blind.
ONE_PASS, N_PASS, PEER = "#0b6e99", "#d97706", "#6b7280"
UNREASONED, DISPLACED = "#b91c1c", "#7c3aed"  # of one rendering: without reasoning, out of context


def check_png(path: str | Path) -> None:
    """Raise ValueError if matplotlib is missing, or `path` doesn't end in ``.png``."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{path}: figures are drawn by matplotlib, which cannot be imported ({error}): "
            "pip install matplotlib"
        ) from error
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: figures are PNG files, expected a name that ends in .png")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` inches, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path, description: str = "") -> None:
    """Write a figure as a PNG file on white at 150 dpi, with `description` in its metadata."""
    drawn = BytesIO()
    figure.savefig(
        drawn, format="png", dpi=150, facecolor="white", metadata={"Description": description}
    )
    write_output(path, drawn.getvalue())
