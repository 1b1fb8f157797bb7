"""The look of figures: axes, labels, bars and histograms, and their SVG elements."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

import numpy as np

from embedcache.arrays import Floats
from embedcache.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#52606d"
SOFT = "#9aa5b1"
GRID = "#e4e7eb"
COLORS = ("#2563eb", "#0d9488", "#9333ea", "#ea580c", "#db2777", "#ca8a04", "#111827")
"""Colors of series, in this order."""

BAD = "#b91c1c"
_NUM_BINS = 40

_MISSING_LETTER = "Glyph .* missing from"  # in a warning of matplotlib
_NUMBER = "{x:,.10g}"


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


def format_gain(value: float) -> str:
    """Return a difference of fractions, such as `+0.02`: in percent, `+20%` could be read as a fifth more."""
    return f"{value:+.3f}".removesuffix("0") if value else "0"


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
    # Axes that share their y-axis are inverted once.
    if not axes.yaxis_inverted():
        axes.invert_yaxis()

    if is_gain:
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: format_gain(value))


def histogram(values_N: Floats, *, x: str, y: str, limit: float | None = None) -> str:
    """Draw the distribution of values as an SVG element, with a logarithmic count axis; bars from `limit` up are red.

    Values that are not finite are left out.
    """
    axes = open_axes(3)
    counts, edges = np.histogram(values_N[np.isfinite(values_N)], bins=_NUM_BINS)
    width = edges[1] - edges[0]
    # A bar with values on both sides of the limit has the color of its middle.
    is_above = np.zeros(_NUM_BINS, bool) if limit is None else edges[:-1] + width / 2 >= limit
    axes.bar(edges[:-1], counts, width=0.92 * width, align="edge", color=np.where(is_above, BAD, COLORS[0]))

    if limit is not None:
        axes.axvline(limit, color=BAD, linestyle="--")
    axes.set_yscale("symlog", linthresh=1)
    label(axes, x, y)
    return svg(axes.figure)


def svg(figure: "Figure") -> str:
    """Return a figure as an SVG element to be placed inside a page; names with dollar signs are drawn as they are.

    Letters are shapes, so that a page looks alike everywhere. If the font lacks one, such as a Chinese character, all
    are text, which the browser draws in its own fonts.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, NullFormatter

    # The formatter of logarithmic axes writes powers as formulas, which are not parsed below.
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                axis.set_major_formatter(_NUMBER)
                axis.set_minor_formatter(NullFormatter())
    for text in figure.findobj(Text):
        text.set_parse_math(False)

    # matplotlib only warns of a missing letter, after it drew a box instead.
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
    # Without the XML declaration, which is allowed only at the beginning of a file.
    return text[text.index("<svg") :]
