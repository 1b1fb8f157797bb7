"""Whether what is measured before training tells what training reaches: correlations over pairs, as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from embedcache.arrays import Array
from embedcache.evaluate.encoder_pairs import METRICS, PairsReport
from embedcache.evaluate.retrieval import WAYS, RetrievalReport
from embedcache.files import replacing, write_atomic
from embedcache.metrics.intervals import rank_correlation
from embedcache.reports.base import COLORS, GRID, INK, format_estimate, format_fraction, label

Pair = tuple[str, str]
"""An image feature and a text feature."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What pairs promised, and what training made of them.

    Args:
        promised: reports of the same pairs, one a split; their figures are averaged.
        reached: recipe -> pair -> the runs' reports, one a seed.
    """

    promised: Sequence[PairsReport]
    reached: Mapping[str, Mapping[Pair, Sequence[RetrievalReport]]]

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, that with the best recall of the first recipe first."""
        first = next(iter(self.reached))
        return sorted(self.reached[first], key=lambda pair: -self._recall(first, pair))

    def metric(self, name: str) -> Array:
        """One of `METRICS` for each of `pairs`: (M,) float64."""
        values = [
            {(figures.image, figures.text): figures.value(name) for figures in report.pairs} for report in self.promised
        ]
        return np.array([np.mean([value[pair] for value in values]) for pair in self.pairs])

    def recall(self, recipe: str) -> Array:
        """Test recall at 10 for each of `pairs`, mean of both ways and of the seeds: (M,) float64."""
        return np.array([self._recall(recipe, pair) for pair in self.pairs])

    def _recall(self, recipe: str, pair: Pair) -> float:
        reports = self.reached[recipe][pair]
        return float(np.mean([report.recalls[way]["r@10"].value for report in reports for way in WAYS]))


def correlation_rows(outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    """Lay the rank correlations out as a table: a row a metric and recipe, `value [low, high]`.

    The last two columns are what the pair of the highest figure reached, and the best that any pair reached.
    """
    rows = []
    for recipe in outcomes.reached:
        recalls = outcomes.recall(recipe)
        for metric, name in METRICS.items():
            values = outcomes.metric(metric)
            found = rank_correlation(values, recalls)
            chosen = [format_fraction(recalls[values.argmax()]), format_fraction(recalls.max())]
            rows.append([name, recipe, format_estimate(found.spearman), format_estimate(found.kendall), *chosen])
    return ["metric", "training", "Spearman", "Kendall", "its choice reached", "best of all"], rows


def write_correlations(path: Path, outcomes: Outcomes, *, title: str, notes: Sequence[str]) -> None:
    """Write a page: a title, what was measured, the correlations, a scatter of each metric, and all pairs.

    The plot goes beside it, as SVG of the same name.
    """
    plot_path = path.with_suffix(".svg")
    with replacing(plot_path) as temporary:
        _plot(outcomes).savefig(temporary, format="svg", metadata={"Date": None})
    blocks = [
        f"# {title}",
        *notes,
        _markdown(*correlation_rows(outcomes)),
        f"![{title}]({plot_path.name})",
        _markdown(*_pair_rows(outcomes)),
    ]
    write_atomic(path, ("\n\n".join(blocks) + "\n").encode())


def _pair_rows(outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    columns = [*(f"test R@10, {recipe}" for recipe in outcomes.reached), *METRICS.values()]
    figures = [*map(outcomes.recall, outcomes.reached), *map(outcomes.metric, METRICS)]
    rows = [[*pair, *(format_fraction(values[row]) for values in figures)] for row, pair in enumerate(outcomes.pairs)]
    return ["image", "text", *columns], rows


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def _plot(outcomes: Outcomes) -> Figure:
    """Draw a panel for each recipe (rows) and metric (columns), a color for each image feature."""
    images = sorted({image for image, _ in outcomes.pairs})
    figure = Figure(figsize=(2.9 * len(METRICS), 0.5 + 2.7 * len(outcomes.reached)), layout="constrained")
    grid = figure.subplots(len(outcomes.reached), len(METRICS), sharex="col", sharey="row", squeeze=False)
    for row, recipe in enumerate(outcomes.reached):
        recalls = outcomes.recall(recipe)
        for column, (metric, name) in enumerate(METRICS.items()):
            axes, values = grid[row, column], outcomes.metric(metric)
            for color, image in zip(COLORS, images, strict=False):
                here = np.array([pair[0] == image for pair in outcomes.pairs])
                axes.scatter(values[here], recalls[here], s=18, color=color, label=image)
            label(axes, name if row == len(outcomes.reached) - 1 else "", "" if column else f"test R@10, {recipe}")
            axes.grid(color=GRID)
            axes.set_axisbelow(True)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    return figure
