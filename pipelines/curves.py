"""Fractions as lines with their intervals, over sizes, noise or anything else that a study varies."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from embedcache.metrics import Estimate
from embedcache.reports.figures import COLORS, GRID, INK, SOFT, format_gain, label, legend_name, open_axes

_MARKERS = "os^DvPX*"
_LOWEST = 0.001  # of a logarithmic axis
_LOG_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Curves(NamedTuple):
    """Lines over the same places of an axis.

    Args:
        ticks: names of the places.
        lines: name of a line -> its estimate at each place, or None.
        places: positions on a logarithmic axis. If empty, places are evenly spaced.
    """

    ticks: Sequence[str]
    lines: Mapping[str, Sequence[Estimate | None]]
    places: Sequence[float] = ()


def estimate_curves(
    panels: Mapping[str, Curves],
    *,
    x: str,
    y: str,
    controls: Collection[str] = (),
    is_log: bool = False,
    is_gain: bool = False,
) -> Figure:
    """Draw fractions as lines with 95% intervals as bands, one panel next to the other, with one legend.

    Args:
        panels: title -> lines. A line has the same color in all panels.
        x, y: labels of the axes.
        controls: lines drawn dashed and thin.
        is_log: use a logarithmic axis of the fractions.
        is_gain: the fractions are differences, above and below a line at zero.
    """
    width = 4.9 if len(panels) < 3 else 4.2
    axes_P = open_axes(4.6, width=3.4 + width * len(panels), ncols=len(panels), squeeze=False, sharey=True)[0]

    names = dict.fromkeys(name for curves in panels.values() for name in curves.lines)
    numbers = {name: number for number, name in enumerate(names)}

    for axes, (title, curves) in zip(axes_P, panels.items(), strict=True):
        places = curves.places or range(len(curves.ticks))
        for name, estimates in curves.lines.items():
            lowest = _LOWEST if is_log else -np.inf
            _draw_curve(axes, numbers[name], name, places, estimates, lowest=lowest, is_control=name in controls)

        if curves.places:
            axes.set_xscale("log")
        axes.set_xticks(places, curves.ticks)
        axes.grid(axis="y", color=GRID)
        axes.set_title(title, color=INK, fontsize=11)
        label(axes, x, y * (axes is axes_P[0]))
    # Once for all panels, which share the axis, and after everything is drawn.
    if is_log:
        axes_P[0].set_yscale("log")
        lowest, highest = axes_P[0].get_ylim()
        ticks = [tick for tick, next_tick in pairwise((*_LOG_TICKS, 1.0)) if next_tick >= lowest and tick / 2 < highest]
        axes_P[0].set_yticks(ticks, [f"{tick:.1%}" if tick < 0.01 else f"{tick:.0%}" for tick in ticks])
    else:
        axes_P[0].yaxis.set_major_formatter(lambda value, _: format_gain(value) if is_gain else _percent(value))
        axes_P[0].set_ylim(bottom=None if is_gain else 0)

    for axes in axes_P:
        axes.minorticks_off()
        if is_gain:
            axes.axhline(0, color=INK, linewidth=1, zorder=0)

    figure: Figure = axes_P[0].figure

    handles: dict[str, Any] = {}
    for axes in axes_P:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [handles[legend_name(name)] for name in numbers],
        list(map(legend_name, numbers)),
        frameon=False,
        labelcolor=INK,
        loc="outside right upper",
        fontsize=9,
    )
    return figure


def _draw_curve(
    axes: Any,
    number: int,
    name: str,
    places: Sequence[float],
    estimates: Sequence[Estimate | None],
    *,
    lowest: float,
    is_control: bool,
) -> None:
    pairs = [(place, estimate) for place, estimate in zip(places, estimates, strict=True) if estimate is not None]

    # A model may lack results at some places; its line joins the others.
    measured_places = [place for place, _ in pairs]
    measured = [estimate for _, estimate in pairs]

    color = SOFT if is_control and number >= len(COLORS) else COLORS[number % len(COLORS)]

    axes.fill_between(
        measured_places,
        [max(estimate.low, lowest) for estimate in measured],
        [max(estimate.high, lowest) for estimate in measured],
        color=color,
        alpha=0.06 if is_control else 0.14,
        linewidth=0,
    )

    axes.plot(
        measured_places,
        [max(estimate.value, lowest) for estimate in measured],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4 if is_control else 5,
        linestyle=(0, (3, 2)) if is_control else "-",
        linewidth=1.1 if is_control else 1.8,
        color=color,
        label=legend_name(name),
    )


def _percent(value: float) -> str:
    return f"{value:.1%}".replace(".0%", "%")
