"""Compare methods on the same test items: a page with a table and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import COLORS, GRID, INK, SOFT, format_estimate
from pipelines.common import markdown_table, write_markdown_page

_KS = (1, 10)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison.

    Args:
        group: group of the method; methods of a group are adjacent and share a color.
        name: name of the method within its group.
        about: column -> further text about the method.
        report: recalls, averaged over the runs.
    """

    group: str
    name: str
    about: Mapping[str, str]
    report: RetrievalReport


def write_comparison(path: Path, methods: Sequence[Method], *, title: str, notes: Sequence[str]) -> None:
    """Write a page with a plot and a table of all methods, whose last row is the chance level.

    Args:
        path: Markdown file to write; the plot is an SVG of the same name.
        methods: at least one method.
        title: title of the page.
        notes: paragraphs that explain how the numbers were measured.
    """
    notes = [*notes, methods[0].report.line() + "."]
    write_markdown_page(path, title, notes, _plot(methods), [_table(methods)])


def _table(methods: Sequence[Method]) -> str:
    about = list(methods[0].about)
    columns = ["", "", *about, *(f"{way} R@{k}" for way in methods[0].report.directions for k in _KS)]
    rows = [
        [method.group, method.name, *(method.about[name] for name in about), *_cells(method.report.recalls)]
        for method in methods
    ]
    chance = ["chance", "", *[""] * len(about), *_cells(methods[0].report.chance)]
    return markdown_table(columns, [*rows, chance])


def _cells(recalls: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    return [format_estimate(recalls[way][f"r@{k}"]) for way in recalls for k in _KS]


def _plot(methods: Sequence[Method]) -> Figure:
    """Draw R@10 in both directions with its interval, one line per method, and the range of chance."""
    groups = list(dict.fromkeys(method.group for method in methods))
    figure = Figure(figsize=(9, 0.8 + 0.24 * len(methods)), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), methods[0].report.directions, strict=True):
        chance = methods[0].report.chance[way]["r@10"]
        axes.axvspan(chance.low, chance.high, color=SOFT, alpha=0.4, linewidth=0)
        for position, method in enumerate(methods):
            estimate = method.report.recalls[way]["r@10"]
            color = COLORS[groups.index(method.group) % len(COLORS)]
            axes.plot([estimate.low, estimate.high], [position, position], color=color, linewidth=1.2)
            axes.plot(estimate.value, position, "o", color=color, markersize=4)
        axes.set_xlabel(f"{way} R@10, 95% interval; gray: chance", color=INK)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=GRID)
        axes.tick_params(colors=INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(methods)), [f"{method.group}, {method.name}".strip(", ") for method in methods])
    axes.invert_yaxis()
    return figure
