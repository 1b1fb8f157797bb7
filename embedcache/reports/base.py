"""Building blocks of every report: numbers and tables as text, JSON values, pages, and the look of figures.

Numbers are written one way everywhere: fractions and cosines with three decimals (`0.066`), estimates with their 95%
interval (`0.066 [0.046, 0.101]`), percentages with one decimal (`12.3%`), counts with thousands separators (`12,345`).
"""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from warnings import catch_warnings, filterwarnings

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from embedcache.arrays import Array, Bools
from embedcache.files import write_atomic
from embedcache.metrics.intervals import Estimate
from embedcache.outputs import new_output
from embedcache.reports.items import PageItem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table: TypeAlias = tuple[list[str], list[list[str]]]
"""Column names, and rows of text."""


def format_fraction(value: float | None) -> str:
    """Return a fraction, cosine or score as text, such as `0.066`; empty for None and NaN."""
    return "" if value is None or np.isnan(value) else f"{value:z.3f}"


def format_estimate(estimate: Estimate) -> str:
    """Return a value with its 95% interval as text, such as `0.066 [0.046, 0.101]`."""
    return str(estimate)


def format_percent(fraction: float) -> str:
    """Return a fraction as a percentage, such as `12.3%`; empty for NaN."""
    return "" if np.isnan(fraction) else f"{fraction:.1%}"


def format_count(count: float) -> str:
    """Return a count as text, such as `12,345`."""
    return f"{count:,.0f}"


def format_part(count: int, total: int) -> str:
    """Return a count and its percentage of a total, such as `12 (3.4%)`."""
    return f"{count:,} ({format_percent(count / total)})" if total else f"{count:,}"


def round_json(value: float | None) -> float | None:
    """Return a number as a JSON value with five decimals; None for None and NaN."""
    return None if value is None or np.isnan(value) else round(float(value), 5)


def estimates_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return estimates as JSON values: each by its name, and `intervals` with the 95% interval of each."""
    return {
        **{name: round_json(estimate.value) for name, estimate in estimates.items()},
        "intervals": {name: interval_json(estimate) for name, estimate in estimates.items()},
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON values: `value` and `interval`."""
    return {"value": round_json(estimate.value), "interval": interval_json(estimate)}


def interval_json(estimate: Estimate) -> list[float | None]:
    """Return the 95% interval of an estimate as a JSON value."""
    return [round_json(estimate.low), round_json(estimate.high)]


@dataclass(frozen=True, kw_only=True)
class QueryExample:
    """A query with its top results, best first; how it went; and a correct item, if none is among the results."""

    query: PageItem
    outcome: str
    is_correct: bool
    results: Sequence[PageItem]
    answer: PageItem | None = None


def ranked_example(query: PageItem, results: Sequence[PageItem], *, rank: int, answer: PageItem) -> QueryExample:
    """Return the example of a query whose best correct item has `rank`; 1 is the top."""
    return QueryExample(
        query=query,
        outcome="correct at rank 1" if rank == 1 else f"first correct result at rank {rank:,}",
        is_correct=rank == 1,
        results=results,
        answer=None if any(result.is_correct for result in results) else answer,
    )


def sample_outcomes(is_correct_N: Bools, num_each: int) -> list[int]:
    """Sample the positions of `num_each` correct outcomes, then of as many wrong ones, or as many as there are."""
    rng = np.random.default_rng(0)
    return [
        int(position)
        for outcome_N in (is_correct_N, ~is_correct_N)
        for position in rng.permutation(np.flatnonzero(outcome_N))[:num_each]
    ]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a page, shown in this order: title, notes, table, figures (SVG), examples."""

    title: str
    notes: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[str] = ()
    examples: Sequence[QueryExample] = ()


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    warnings: Iterable[str] = (),
    sections: Sequence[Section],
    credit: str = "",
) -> None:
    """Write a report as one self-contained HTML page; `warnings` at the top are reasons to doubt the numbers."""
    values = {"title": title, "summary": summary, "warnings": warnings, "sections": sections, "credit": credit}
    with new_output(path) as temporary:
        write_page(temporary, "report.html.j2", **values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template of this folder and write the page, in place of an earlier one; it loads nothing from elsewhere.

    Text in `values` is escaped; SVG figures go through `| safe`.
    """
    environment = Environment(
        loader=PackageLoader("embedcache.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fraction": format_fraction, "count": format_count}
    write_atomic(path, environment.get_template(template).render(**values).encode())


INK, SOFT, GRID = "#52606d", "#9aa5b1", "#e4e7eb"
COLORS = ("#2563eb", "#0d9488", "#9333ea", "#ea580c", "#db2777", "#ca8a04", "#111827")
"""Colors of series, in this order."""

BAD = "#b91c1c"

_MISSING_LETTER = "Glyph .* missing from"  # in a warning of matplotlib
_MARKERS = "os^DvPX*"
_LOWEST = 0.001  # of a logarithmic axis
_LOG_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def open_axes(height: float, *, width: float = 9, **subplots: Any) -> Any:
    """Create a figure of that size in inches; return its axes, or an array of them, see `Figure.subplots`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots(**subplots)


def label(axes: Any, x: str, y: str = "") -> None:
    """Label both axes and hide the top and right spines."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def legend_name(name: str) -> str:
    """Return a name as the label of a line: matplotlib leaves those that begin with an underscore out of legends."""
    return f" {name}" if name.startswith("_") else name


def estimate_bars(
    axes: Any,
    estimates: Mapping[str, Estimate],
    *,
    height: float,
    colors: Sequence[str] = COLORS,
    is_gain: bool = False,
) -> None:
    """Draw one horizontal bar per named estimate with its interval as a line, the first one at the top.

    With `is_gain` the estimates are differences of fractions: signed, and with a line at zero.
    """
    for position, estimate in enumerate(estimates.values()):
        axes.barh(position, estimate.value, color=colors[position % len(colors)], height=height)
        axes.plot([estimate.low, estimate.high], [position, position], color="#111827", linewidth=1.5)
    axes.set_yticks(range(len(estimates)), list(estimates))
    if not axes.yaxis_inverted():
        axes.invert_yaxis()  # once for axes that share it
    if is_gain:
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: _tick(value, is_signed=True))


class Curves(NamedTuple):
    """Lines over the same places of an axis.

    Args:
        ticks: names of the places.
        lines: name of a line -> its estimate at each place; None where there is none.
        places: positions on a logarithmic axis; evenly spaced without them.
    """

    ticks: Sequence[str]
    lines: Mapping[str, Sequence[Estimate | None]]
    places: Sequence[float] = ()


def _tick(value: float, *, is_signed: bool) -> str:
    """Return a fraction in percent; a difference of fractions as in tables, where `+20%` would be a fifth more."""
    if is_signed:
        return f"{value:+.3f}".removesuffix("0") if value else "0"
    return f"{value:.1%}".replace(".0%", "%")


def estimate_curves(
    panels: Mapping[str, Curves],
    *,
    x: str,
    y: str,
    controls: Collection[str] = (),
    is_log: bool = False,
    is_gain: bool = False,
) -> "Figure":
    """Draw fractions as lines with 95% intervals as bands, one panel beside the other, with one legend.

    Args:
        panels: title -> lines. A line of one name has one color in all panels.
        x, y: labels of the axes.
        controls: lines that are drawn dashed and thin.
        is_log: use a logarithmic axis of the fractions.
        is_gain: the fractions are differences, above and below a line at zero.
    """
    width = 4.9 if len(panels) < 3 else 4.2
    axes_P = open_axes(4.6, width=3.4 + width * len(panels), ncols=len(panels), squeeze=False, sharey=True)[0]
    names = dict.fromkeys(name for curves in panels.values() for name in curves.lines)
    numbers = {name: number for number, name in enumerate(names)}
    for axes, (title, curves) in zip(axes_P, panels.items(), strict=True):
        places = curves.places or range(len(curves.ticks))
        for name, found in curves.lines.items():
            lowest = _LOWEST if is_log else -np.inf
            _draw_curve(axes, numbers[name], name, places, found, lowest=lowest, is_control=name in controls)
        if curves.places:
            axes.set_xscale("log")
        axes.set_xticks(places, curves.ticks)
        axes.grid(axis="y", color=GRID)
        axes.set_title(title, color=INK, fontsize=11)
        label(axes, x, y * (axes is axes_P[0]))
    if is_log:  # once for all, which share it, and when all is drawn
        axes_P[0].set_yscale("log")
        lowest, highest = axes_P[0].get_ylim()
        ticks = [tick for tick, above in pairwise((*_LOG_TICKS, 1.0)) if above >= lowest and tick / 2 < highest]
        axes_P[0].set_yticks(ticks, [f"{tick:.1%}" if tick < 0.01 else f"{tick:.0%}" for tick in ticks])
    else:
        axes_P[0].yaxis.set_major_formatter(lambda value, _: _tick(value, is_signed=is_gain))
        axes_P[0].set_ylim(bottom=None if is_gain else 0)
    for axes in axes_P:
        axes.minorticks_off()
        if is_gain:
            axes.axhline(0, color=INK, linewidth=1, zorder=0)
    figure: Figure = axes_P[0].figure
    handles = {name: handle for axes in axes_P for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
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
    drawn = [(place, estimate) for place, estimate in zip(places, estimates, strict=True) if estimate is not None]
    places, found = [place for place, _ in drawn], [estimate for _, estimate in drawn]
    color = SOFT if is_control and number >= len(COLORS) else COLORS[number % len(COLORS)]
    axes.fill_between(
        places,
        [max(estimate.low, lowest) for estimate in found],
        [max(estimate.high, lowest) for estimate in found],
        color=color,
        alpha=0.06 if is_control else 0.14,
        linewidth=0,
    )
    axes.plot(
        places,
        [max(estimate.value, lowest) for estimate in found],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4 if is_control else 5,
        linestyle=(0, (3, 2)) if is_control else "-",
        linewidth=1.1 if is_control else 1.8,
        color=color,
        label=legend_name(name),
    )


def count_histogram(lows_H: Array, width: float, counts_H: Array, *, x: str, y: str, limit: float | None = None) -> str:
    """Draw a histogram with a logarithmic count axis as an SVG element; bars from `limit` upward are red.

    `lows_H` are the (H,) lower edges of the bins, `counts_H` the (H,) counts.
    """
    axes = open_axes(3)
    is_above = np.zeros(len(lows_H), bool) if limit is None else lows_H + width / 2 >= limit
    colors = np.where(is_above, BAD, COLORS[0])
    axes.bar(lows_H, counts_H, width=0.92 * width, align="edge", color=colors)
    if limit is not None:
        axes.axvline(limit, color=BAD, linestyle="--")
    axes.set_yscale("symlog", linthresh=1)
    label(axes, x, y)
    return svg(axes.figure)


def svg(figure: "Figure") -> str:
    """Return a figure as an SVG element to be placed inside a page; names with dollar signs are drawn as they are.

    Letters are shapes, so that a page looks alike everywhere. If the font lacks one, such as those of Chinese names,
    all are text, which the browser draws in fonts of its own.
    """
    from matplotlib import rc_context

    _draw_as_written(figure)
    try:
        with catch_warnings():
            filterwarnings("error", _MISSING_LETTER)
            return _save_svg(figure)
    except UserWarning:
        with catch_warnings(), rc_context({"svg.fonttype": "none"}):
            filterwarnings("ignore", _MISSING_LETTER)
            return _save_svg(figure)


def _save_svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_as_written(figure: "Figure") -> None:
    """Keep matplotlib from reading formulas between the dollar signs of names; only powers on axes are formulas."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    powers: set[Text] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for formatter, ticks in (
            (axis.get_major_formatter(), axis.get_major_ticks()),
            (axis.get_minor_formatter(), axis.get_minor_ticks()),
        ):
            if isinstance(formatter, LogFormatter):
                powers.update(tick.label1 for tick in ticks)
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)
