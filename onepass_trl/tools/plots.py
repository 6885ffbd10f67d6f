"""Figures as PNG files, if matplotlib is installed. No display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour for each way to train, in every figure; distinct in grey and to the colour-blind.
ONE_PASS, N_PASS, PEER = "#0b6e99", "#d97706", "#6b7280"
UNREASONED, DISPLACED = "#b91c1c", "#7c3aed"  # of one rendering: without reasoning, out of context


def check_png(path: str | Path) -> None:
    """Raise unless a figure can be written to `path`, before the work that it would show.

    Raises:
        ValueError: if matplotlib is missing, or `path` doesn't end in ``.png``.
        FileNotFoundError: if its folder doesn't exist.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{path}: figures are drawn by matplotlib, which cannot be imported ({error}): "
            "pip install matplotlib"
        ) from error
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: figures are PNG files, expected a name that ends in .png")
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; create it first")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` inches, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path, description: str = "") -> None:
    """Write a figure as a PNG file on white at 150 dpi, with `description` in its metadata."""
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Description": description})
