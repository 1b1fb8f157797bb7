"""A probe as a page: accuracies beside chance, the few-shot curve, and each class."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from embedcache.evaluate.classifiers import METHODS
from embedcache.evaluate.plots import accuracy_bars, class_bars
from embedcache.evaluate.probe import ProbeReport
from embedcache.evaluate.probe_report import few_shot_rows, score_rows, share
from embedcache.pages.figures import COLOURS, GRID, INK, label, svg
from embedcache.pages.sections import Section, write_sections

_MOST_CLASSES = 40


def write_probe(path: Path, report: ProbeReport) -> None:
    """Write the page. It asks for nothing from outside.

    Args:
        path: of the page.
        report: what was measured.
    """
    write_sections(
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
        notes.append(
            "Labels shuffled: fitted the same way on training labels in random order. The mean must be at chance; one "
            "shuffle need not be, as a classifier sends most of a class to one label. Intervals are over shuffles, too."
        )
    rows = {score.method: score.accuracy for score in report.scores}
    rows |= {f"{control.method}, labels shuffled": control.accuracy for control in report.controls}
    figure = accuracy_bars(rows, chance=max(report.majority, report.uniform))
    return Section(title="Accuracy on the test items", notes=notes, table=score_rows(report), figures=[figure])


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
    best, data = max(report.scores, key=lambda score: score.accuracy.value), report.labelled
    count_C = np.bincount(data.examples.labels[data.rows("test")], minlength=len(data.names))
    hardest = [c for c in np.argsort(best.recalls, kind="stable") if count_C[c]]
    shown = hardest[:_MOST_CLASSES]
    rows = [
        [data.names[c], f"{count_C[c]:,}", *(share(float(score.recalls[c])) for score in report.scores)] for c in shown
    ]
    some = f"The {len(shown)} of {len(hardest):,} classes that are" if len(shown) < len(hardest) else "All classes,"
    return Section(
        title="Each class",
        notes=[f"{some} hardest for {best.method} first; the figure is of {best.method}."],
        table=(["", "test items", *(score.method for score in report.scores)], rows),
        figures=[class_bars(data.names, best.recalls, chance=max(report.majority, report.uniform))],
    )


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
