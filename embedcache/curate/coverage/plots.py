"""Figures of coverage as SVG text, to be placed inside a page."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from embedcache.arrays import Ints
from embedcache.curate.coverage.coverage import Counts
from embedcache.pages.figures import BAD, COLOURS, INK, SOFT, label, svg

MOST_BARS = 50
"""Concepts drawn as bars."""

_COUNT = StrMethodFormatter("{x:,.0f}")


def coverage_curve(parts: Sequence[Counts], *, min_count: int) -> str:
    """Draw the items of each concept, the largest first: a line a part, and one where gaps begin."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for part, colour in zip(parts, COLOURS, strict=False):
        counts = np.sort(part.counts)[::-1]
        axes.plot(np.arange(1, len(counts) + 1), counts, color=colour, label=part.name, linewidth=2)
    axes.axhline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_COUNT)
    axes.legend(frameon=False, labelcolor=INK)
    label(axes, f"concepts, the largest first; dashed: {min_count:,}, below are gaps", "items above the threshold")
    return svg(figure)


def coverage_bars(names: Sequence[str], parts: Sequence[Counts], *, min_count: int) -> str:
    """Draw a bar a concept and part, the largest first; of many concepts the largest and the smallest."""
    order = largest_first(parts[0].counts)
    if len(order) > MOST_BARS:
        order = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
    figure = Figure(figsize=(9, 0.8 + (0.12 + 0.12 * len(parts)) * len(order)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(parts)
    for number, part in enumerate(parts):
        places = np.arange(len(order)) + (number - (len(parts) - 1) / 2) * height
        axes.barh(places, part.counts[order], color=COLOURS[number], height=height, label=part.name)
    axes.axvline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_COUNT)
    axes.set_yticks(range(len(order)), [names[number] for number in order], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if len(order) < len(names):
        axes.axhline(MOST_BARS // 2 - 0.5, color=SOFT, linewidth=1)
    if len(parts) > 1:
        axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    label(axes, f"items above the threshold; dashed: {min_count:,}, below are gaps")
    return svg(figure)


def largest_first(counts_C: Ints) -> Ints:
    """Order concepts by their counts, the largest first; of ties the first."""
    order: Ints = np.argsort(-counts_C, kind="stable")
    return order
