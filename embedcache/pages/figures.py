"""The look of all figures, and figures as SVG text to be placed inside a page."""

import io
from typing import Any

from matplotlib.figure import Figure

INK, SOFT, GRID = "#52606d", "#9aa5b1", "#e4e7eb"
COLOURS = ("#2563eb", "#0d9488", "#9333ea", "#ea580c", "#db2777", "#ca8a04", "#111827")
"""For series, in this order."""

GOOD, BAD = "#15803d", "#b91c1c"


def label(axes: Any, x: str, y: str = "") -> None:
    """Name both axes, and keep only their two lines."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def svg(figure: Figure) -> str:
    """Write a figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
