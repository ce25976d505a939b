"""What all plots share: matplotlib without a display, colours, legends, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Not quite black: an SVG file leaves out the colour of what is black, and then nothing can change it.
INK = "#010101"


def pyplot() -> Any:
    """matplotlib's pyplot, imported where it is needed: the commands' help does without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int = 130) -> Path:
    """Write a figure as a PNG and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    pyplot().close(figure)
    return path


def legend_beside(axes: Any, *entries: Any, x: float = 1.0, **options: Any) -> None:
    """Right of the axes, where it hides nothing."""
    axes.legend(*entries, loc="center left", bbox_to_anchor=(x, 0.5), **options)
