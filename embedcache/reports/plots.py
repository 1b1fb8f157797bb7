"""Figures of evaluations as SVG text, to be placed inside a page."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from embedcache.arrays import Array
from embedcache.evaluate.retrieval import WAYS, RetrievalReport
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import COLOURS, INK, SOFT, label, svg

_MOST_BARS = 40
_MOST_CELLS = 40

Figures = Mapping[str, Mapping[str, Estimate]]
"""Retrieval direction -> metric -> estimate."""


def recall_bars(rows: Mapping[str, Figures]) -> str:
    """Draw R@10 of each row both ways, with its interval."""
    figure = Figure(figsize=(9, 0.5 + 0.42 * len(rows)), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for position, figures in enumerate(rows.values()):
            estimate = figures[way]["r@10"]
            axes.barh(position, estimate.value, color=COLOURS[position % len(COLOURS)], height=0.55)
            axes.plot([estimate.low, estimate.high], [position, position], color="#111827", linewidth=1.5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis() if way == WAYS[0] else None
        label(axes, f"{way} R@10 with its 95 % interval")
    return svg(figure)


def recall_curves(reports: Mapping[str, RetrievalReport]) -> str:
    """Draw recall at every k, both ways, a line a report; gray is chance on the first one's items."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for position, (name, report) in enumerate(reports.items()):
            ks = np.arange(1, len(report.curves[way]) + 1)
            axes.plot(ks, report.curves[way], color=COLOURS[position % len(COLOURS)], label=name)
        chance = next(iter(reports.values())).chance[way]
        axes.plot(
            [int(name[2:]) for name in chance], [one.value for one in chance.values()], color=SOFT, label="chance"
        )
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        label(axes, f"k of {way} R@k", "recall")
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")
    return svg(figure)


def accuracy_bars(rows: Mapping[str, Estimate], *, chance: float) -> str:
    """Draw an accuracy a row with its interval, and a line where chance is."""
    figure = Figure(figsize=(9, 0.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for position, estimate in enumerate(rows.values()):
        axes.barh(position, estimate.value, color=COLOURS[0], height=0.6)
        axes.plot([estimate.low, estimate.high], [position, position], color="#111827", linewidth=1.5)
    axes.axvline(chance, color=SOFT, linestyle="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    label(axes, "accuracy with its 95 % interval; dashed: chance")
    return svg(figure)


def class_bars(names: Sequence[str], accuracies_C: Array, *, chance: float) -> str:
    """Draw each class's accuracy, best first; of many classes the best and the worst."""
    order = np.argsort(-np.nan_to_num(accuracies_C), kind="stable")
    if len(order) > _MOST_BARS:
        order = np.concatenate([order[: _MOST_BARS // 2], order[-_MOST_BARS // 2 :]])
    figure = Figure(figsize=(9, 0.6 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), accuracies_C[order], color=COLOURS[0], height=0.7)
    axes.axvline(chance, color=SOFT, linestyle="--")
    axes.set_yticks(range(len(order)), [names[number] for number in order], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    label(axes, "share of the class's items that are right; dashed: chance")
    return svg(figure)


def confusion_map(names: Sequence[str], confusion_CC: Array) -> str:
    """Draw which class is taken for which, as shares of each row; of many classes those confused most."""
    shown = _most_confused(confusion_CC)
    shares = confusion_CC[np.ix_(shown, shown)] / np.maximum(1, confusion_CC[shown].sum(axis=1))[:, None]
    side = 2.2 + 0.3 * len(shown)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(shown) <= 20:
        for row, column in np.ndindex(shares.shape):
            if shares[row, column] >= 0.005:
                color = "white" if shares[row, column] > 0.5 else INK
                text = f"{100 * shares[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    ticks = range(len(shown))
    axes.set_xticks(ticks, [names[number] for number in shown], rotation=90, fontsize=8)
    axes.set_yticks(ticks, [names[number] for number in shown], fontsize=8)
    label(axes, "predicted; numbers are % of the row", "true class")
    return svg(figure)


def _most_confused(confusion_CC: Array) -> Array:
    if len(confusion_CC) <= _MOST_CELLS:
        return np.arange(len(confusion_CC))
    errors = confusion_CC.sum(axis=1) + confusion_CC.sum(axis=0) - 2 * confusion_CC.diagonal()
    return np.sort(np.argsort(-errors, kind="stable")[:_MOST_CELLS])
