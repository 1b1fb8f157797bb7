"""The look of all figures, and figures as SVG text to be placed inside a page."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from embedcache.arrays import Array

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


def count_bars(lows_H: Array, width: float, counts_H: Array, *, x: str, y: str, limit: float | None = None) -> str:
    """Draw counts as bars on a logarithmic scale; those from a limit on in red.

    Args:
        lows_H: (H,) where each bar begins.
        width: of a bar.
        counts_H: (H,) its count.
        x: what is counted.
        y: what the counts are of.
        limit: None draws all bars alike.
    """
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    is_above = np.zeros(len(lows_H), bool) if limit is None else lows_H + width / 2 >= limit
    colours = np.where(is_above, BAD, COLOURS[0])
    axes.bar(lows_H, counts_H, width=0.92 * width, align="edge", color=colours)
    if limit is not None:
        axes.axvline(limit, color=BAD, linestyle="--")
    axes.set_yscale("symlog", linthresh=1)
    label(axes, x, y)
    return svg(figure)


def svg(figure: Figure) -> str:
    """Write a figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
