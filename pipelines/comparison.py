"""Many methods on the same held-out items, side by side: a Markdown table, and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from embedcache.evaluate.retrieval import WAYS, RetrievalReport
from embedcache.files import replacing, write_atomic
from embedcache.reports.base import COLORS, GRID, INK, SOFT, format_estimate

_KS = (1, 10)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison.

    Args:
        group: methods of one group stand together and share a color.
        name: of the method in its group.
        about: column -> what else is said of it.
        report: its runs, averaged.
    """

    group: str
    name: str
    about: Mapping[str, str]
    report: RetrievalReport


def write_comparison(path: Path, methods: Sequence[Method], *, title: str, notes: Sequence[str]) -> None:
    """Write a page: a title, what was measured, the plot, and the table, which ends with chance.

    The plot goes beside it, as SVG of the same name.

    Args:
        path: the Markdown file.
        methods: at least one.
        title: of the page.
        notes: paragraphs that say how the figures came to be.
    """
    plot_path = path.with_suffix(".svg")
    with replacing(plot_path) as temporary:
        _plot(methods).savefig(temporary, format="svg", metadata={"Date": None})
    lines = [f"# {title}", *notes, methods[0].report.line() + ".", f"![{title}]({plot_path.name})"]
    write_atomic(path, ("\n\n".join([*lines, _table(methods)]) + "\n").encode())


def _table(methods: Sequence[Method]) -> str:
    about = list(methods[0].about)
    columns = ["", "", *about, *(f"{way} R@{k}" for way in WAYS for k in _KS)]
    rows = [
        [method.group, method.name, *(method.about[name] for name in about), *_cells(method.report.recalls)]
        for method in methods
    ]
    chance = ["chance", "", *[""] * len(about), *_cells(methods[0].report.chance)]
    rule = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rule, *rows, chance])


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [format_estimate(figures[way][f"r@{k}"]) for way in WAYS for k in _KS]


def _plot(methods: Sequence[Method]) -> Figure:
    """Draw R@10 both ways with its interval, a line a method, and where chance lies."""
    groups = list(dict.fromkeys(method.group for method in methods))
    figure = Figure(figsize=(9, 0.8 + 0.24 * len(methods)), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        chance = methods[0].report.chance[way]["r@10"]
        axes.axvspan(chance.low, chance.high, color=SOFT, alpha=0.4, linewidth=0)
        for position, method in enumerate(methods):
            estimate = method.report.recalls[way]["r@10"]
            color = COLORS[groups.index(method.group) % len(COLORS)]
            axes.plot([estimate.low, estimate.high], [position, position], color=color, linewidth=1.2)
            axes.plot(estimate.value, position, "o", color=color, markersize=4)
        axes.set_xlabel(f"{way} R@10, 95 % interval; gray: chance", color=INK)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=GRID)
        axes.tick_params(colors=INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(methods)), [f"{method.group}, {method.name}".strip(", ") for method in methods])
    axes.invert_yaxis()
    return figure
