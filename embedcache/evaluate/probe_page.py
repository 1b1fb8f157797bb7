"""A probe as a page: accuracies beside chance, the few-shot curve, and each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from embedcache.arrays import Ints
from embedcache.evaluate.classifiers import METHODS
from embedcache.evaluate.page import Section, write_evaluation
from embedcache.evaluate.probe import ProbeReport, Score
from embedcache.evaluate.probe_report import few_shot_rows, score_rows, share
from embedcache.pages.figures import COLOURS, GRID, INK, SOFT, label, svg

_MOST_CLASSES = 40


def write_probe(path: Path, report: ProbeReport) -> None:
    """Write the page. It asks for nothing from outside.

    Args:
        path: of the page.
        report: what was measured.
    """
    write_evaluation(
        path,
        title=f"What {report.labelled.side.name} knows of {report.settings.label!r}",
        lead=report.line(),
        warnings=report.warnings(),
        sections=[_accuracy(report), *([_few_shots(report)] if report.few_shots else []), _classes(report)],
    )


def _accuracy(report: ProbeReport) -> Section:
    notes = [f"{score.method}: {_about(score.method)}" for score in report.scores]
    notes.append("Vectors have length 1; for what is linear they are then centred, and divided by one number.")
    if report.controls:
        notes.append("Labels shuffled: fitted the same way on training labels in random order; it must end at chance.")
    return Section(title="Accuracy on the test items", notes=notes, table=score_rows(report), figures=[_bars(report)])


def _about(method: str) -> str:
    """Give the first line of what a method says of itself."""
    return (METHODS.load(method).__doc__ or "a method of your own").strip().partition("\n")[0]


def _few_shots(report: ProbeReport) -> Section:
    note = (
        f"Fitted on that many training items a class, {report.settings.num_draws} drawings, at a strength that is "
        "fixed; intervals are over drawings and test items."
    )
    return Section(
        title="From a few items a class", notes=[note], table=few_shot_rows(report), figures=[_curve(report)]
    )


def _classes(report: ProbeReport) -> Section:
    best = max(report.scores, key=lambda score: score.accuracy.value)
    data = report.labelled
    count_C = np.bincount(data.examples.labels[data.rows("test")], minlength=len(data.names))
    shown = _worst(best, count_C)
    rows = [
        [data.names[c], f"{count_C[c]:,}", *(share(float(score.recalls[c])) for score in report.scores)] for c in shown
    ]
    columns = ["", "test items", *(score.method for score in report.scores)]
    some = f"The {len(shown)} of {(count_C > 0).sum():,} classes" if len(shown) < (count_C > 0).sum() else "All classes"
    return Section(
        title="Each class",
        notes=[f"{some}, the hardest for {best.method} first."],
        table=(columns, rows),
        figures=[_class_bars([data.names[c] for c in shown], best.recalls[shown].tolist(), best)],
    )


def _worst(score: Score, count_C: Ints) -> Ints:
    """Get the classes with the lowest recall, lowest first; those without a test item are left out."""
    order = np.argsort(score.recalls, kind="stable")
    worst: Ints = order[count_C[order] > 0][:_MOST_CLASSES]
    return worst


def _bars(report: ProbeReport) -> str:
    """Draw each accuracy with its interval, and where chance lies."""
    scores = [(score.method, score, COLOURS[0]) for score in report.scores]
    scores += [(f"{score.method}, shuffled", score, SOFT) for score in report.controls]
    figure = Figure(figsize=(9, 1 + 0.36 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for position, (_, score, colour) in enumerate(scores):
        estimate = score.accuracy
        axes.barh(position, estimate.value, color=colour, height=0.6)
        axes.plot([estimate.low, estimate.high], [position, position], color=INK, linewidth=1.5)
    axes.axvline(max(report.majority, report.uniform), color=INK, linestyle=":", linewidth=1)
    _finish(axes, [name for name, _, _ in scores], "top-1 accuracy; line: 95 % interval; dots: chance")
    return svg(figure)


def _class_bars(names: Sequence[str], recalls: Sequence[float], score: Score) -> str:
    figure = Figure(figsize=(9, 1 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), recalls, color=COLOURS[0], height=0.6)
    axes.axvline(score.mean_per_class, color=INK, linestyle=":", linewidth=1)
    _finish(axes, names, f"share of the class's test items that {score.method} gets right; dots: mean of all classes")
    return svg(figure)


def _finish(axes: Any, names: Sequence[str], what: str) -> None:
    axes.set_yticks(range(len(names)), [name if len(name) <= 32 else name[:31] + "…" for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    label(axes, what)


def _curve(report: ProbeReport) -> str:
    """Draw accuracy by the number of items a class, and where all training items end."""
    shots = sorted({one.shots for one in report.few_shots})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for score, colour in zip(report.scores, COLOURS * len(report.scores), strict=False):
        found = sorted((one for one in report.few_shots if one.method == score.method), key=lambda one: one.shots)
        values = [one.accuracy for one in found]
        axes.fill_between(
            shots, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(shots, [v.value for v in values], "o-", color=colour, markersize=4, label=score.method)
        axes.axhline(score.accuracy.value, color=colour, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shots))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shots, list(map(str, shots)))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color=GRID)
    label(axes, "training items a class; dashes: all of them", "top-1 accuracy")
    figure.legend(frameon=False, labelcolor=INK, loc="outside upper right", ncols=4)
    return svg(figure)
