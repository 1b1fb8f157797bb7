"""A report as one page of sections: tables, figures, and examples to look at.

Filling a page's template in.

The look of all figures, and figures as SVG text to be placed inside a page.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from embedcache.arrays import Array
from embedcache.files import write_atomic

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The names of the columns, and rows of text."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture or a text among a query's answers.

    Args:
        text: shown below the picture, or alone.
        picture: a `data:` URL.
        is_right: marked where true.
    """

    text: str = ""
    picture: str | None = None
    is_right: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A query, what was ranked first for it, and what would have been right.

    Args:
        query: what was asked.
        said: how it went, in a few words.
        is_right: whether it went well.
        shown: what was ranked first, best first.
        answer: what is right, where it is not among those.
    """

    query: Shown
    said: str
    is_right: bool
    shown: Sequence[Shown]
    answer: Shown | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page, in this order: title, notes, table, figures, cases."""

    title: str
    notes: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[str] = ()
    cases: Sequence[Case] = ()


def write_sections(
    path: Path,
    *,
    title: str,
    lead: str,
    warnings: Sequence[str] = (),
    sections: Sequence[Section],
    credit: str = "",
) -> None:
    """Write the page. It asks for nothing from outside.

    Args:
        path: of the page.
        title: of the page.
        lead: what was measured, in a sentence.
        warnings: what makes its figures doubtful, shown at the top.
        sections: in order.
        credit: whose the pictures are.
    """
    write_page(path, "report.html.j2", title=title, lead=lead, warnings=warnings, sections=sections, credit=credit)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a page template and write the page atomically.

    Args:
        path: file to write.
        template: name of a template in `embedcache/reports`, such as `report.html.j2`.
        values: variables of the template; text is escaped, SVG figures go through `| safe`.
    """
    environment = Environment(
        loader=PackageLoader("embedcache.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_atomic(path, environment.get_template(template).render(**values).encode())


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
    colors = np.where(is_above, BAD, COLOURS[0])
    axes.bar(lows_H, counts_H, width=0.92 * width, align="edge", color=colors)
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
