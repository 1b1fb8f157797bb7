"""Building blocks of every report: numbers and tables as text, JSON values, pages, and the look of figures.

Numbers are written one way everywhere: fractions and cosines with three decimals (`0.066`), estimates with their 95%
interval (`0.066 [0.046, 0.101]`), percentages with one decimal (`12.3%`), counts with thousands separators (`12,345`).
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
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


def format_gain(value: float) -> str:
    """Return a difference of fractions, such as `+0.02`: in percent, `+20%` could be read as a fifth more."""
    return f"{value:+.3f}".removesuffix("0") if value else "0"


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
        axes.xaxis.set_major_formatter(lambda value, _: format_gain(value))


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
