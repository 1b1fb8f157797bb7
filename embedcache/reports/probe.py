"""A probe's figures as rows to print and as JSON.

A probe as a page: accuracies beside chance, the few-shot curve, and each class.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from embedcache.arrays import Array
from embedcache.evaluate.classifiers import METHODS
from embedcache.evaluate.probe import Control, FewShot, ProbeReport, Score
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import COLOURS, GRID, INK, Section, label, svg, write_sections
from embedcache.reports.plots import accuracy_bars, class_bars
from embedcache.reports.retrieval import format_estimate

Rows = tuple[list[str], list[list[str]]]
"""The names of the columns, and rows of text."""

_PREFIXES = {"logistic": "lp"}  # as CLIP_benchmark names those of its linear probe


def score_rows(report: ProbeReport) -> Rows:
    """Lay the figures out as a table: a row a method, a row a control, and two of what no feature reaches."""
    columns = ["", "top-1 [95 %]", "top-5", "mean per class [95 %]", "chosen on validation"]
    return columns, [
        *[_cells(score) for score in report.scores],
        *[[shuffled(control), format_estimate(control.accuracy), "", "", ""] for control in report.controls],
        ["the most frequent class", share(report.majority), "", share(report.uniform), ""],
        ["a class at random", share(report.uniform), "", share(report.uniform), ""],
    ]


def few_shot_rows(report: ProbeReport) -> Rows:
    """Lay the few-shot figures out: a row a method, a column a number of shots."""
    shots = sorted({one.shots for one in report.few_shots})
    found = {(one.method, one.shots): format_estimate(one.accuracy) for one in report.few_shots}
    methods = dict.fromkeys(one.method for one in report.few_shots)
    columns = ["top-1 [95 %]", *(f"{number} a class" for number in shots)]
    return columns, [[method, *(found[method, number] for number in shots)] for method in methods]


def probe_json(report: ProbeReport, dataset: str) -> dict[str, Any]:
    """Give the figures as JSON values, in the fields of CLIP_benchmark's files; `details` holds all else.

    Logistic regression is its `lp_`; other methods begin with their own name.

    Args:
        report: the figures.
        dataset: the name to give the dataset.
    """
    side = report.labeled.side
    is_linear = any(score.method != "knn" for score in report.scores)
    return {
        "dataset": dataset,
        "model": side.spec,
        "pretrained": side.fingerprint.get("revision") or f"sha256:{side.fingerprint['weights'][:16]}",
        "task": "linear_probe" if is_linear else "knn",
        "metrics": {name: value for score in report.scores for name, value in _metrics(score).items()},
        "language": None,
        "details": _details(report),
    }


def shuffled(control: Control) -> str:
    """Name a control, and between which accuracies its shuffles lie."""
    low, high = share(min(control.by_shuffle)), share(max(control.by_shuffle))
    return f"{control.method}, labels shuffled {len(control.by_shuffle)} times ({low} to {high})"


def share(value: float | None) -> str:
    """Write a share with three digits: `.123`; nothing for None."""
    return "" if value is None else f"{value:.3f}".replace("0.", ".", 1)


def _cells(score: Score) -> list[str]:
    about = {"C": "C = {:g}", "shrinkage": "shrinkage {:g}"}
    chosen = [text.format(score.chosen[key]) for key, text in about.items() if key in score.chosen]
    accuracy, by_class = format_estimate(score.accuracy), format_estimate(score.mean_per_class)
    return [score.method, accuracy, share(score.top5), by_class, ", ".join(chosen)]


def _metrics(score: Score) -> dict[str, float | None]:
    prefix = _PREFIXES.get(score.method, score.method)
    return {
        f"{prefix}_acc1": _round(score.accuracy.value),
        f"{prefix}_acc5": None if score.top5 is None else _round(score.top5),
        f"{prefix}_mean_per_class_recall": _round(score.mean_per_class.value),
    }


def _details(report: ProbeReport) -> dict[str, Any]:
    data, settings = report.labeled, report.settings
    return {
        "feature": data.side.name,
        "modality": data.side.modality,
        "mean_of_tokens": data.side.has_tokens,
        "fingerprint": dict(data.side.fingerprint),
        "label": settings.label,
        "part": settings.part,
        "cut": data.cut,
        "seed": settings.seed,
        "num_items": report.counts,
        "num_unlabelled": data.num_unlabeled,
        "num_left_out": data.num_left_out,
        "num_classes": len(data.names),
        "overlap": data.overlap(),
        "warnings": report.warnings(),
        "chance": {"majority_acc1": _round(report.majority), "uniform_acc1": _round(report.uniform)},
        "methods": {score.method: _score_json(score, data.names) for score in report.scores},
        "shuffled_labels": {control.method: _control_json(control) for control in report.controls},
        "few_shot": _few_shot_json(report.few_shots),
        "few_shot_draws": settings.num_draws if settings.shots else 0,
    }


def _score_json(score: Score, names: Sequence[str]) -> dict[str, Any]:
    return {
        **_estimate_json(score.accuracy),
        "acc5": None if score.top5 is None else _round(score.top5),
        "mean_per_class_recall": _round(score.mean_per_class.value),
        "mean_per_class_interval": [_round(score.mean_per_class.low), _round(score.mean_per_class.high)],
        "chosen": dict(score.chosen),
        "recall": _recalls_json(score.recalls, names),
    }


def _control_json(control: Control) -> dict[str, Any]:
    return {**_estimate_json(control.accuracy), "by_shuffle": list(map(_round, control.by_shuffle))}


def _recalls_json(recalls_C: Array, names: Sequence[str]) -> dict[str, float | None]:
    return {
        name: None if np.isnan(recall) else _round(recall)
        for name, recall in zip(names, recalls_C.tolist(), strict=True)
    }


def _few_shot_json(few_shots: Sequence[FewShot]) -> Mapping[str, Mapping[str, Any]]:
    return {
        method: {str(one.shots): _estimate_json(one.accuracy) for one in few_shots if one.method == method}
        for method in dict.fromkeys(one.method for one in few_shots)
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {"acc1": _round(estimate.value), "interval": [_round(estimate.low), _round(estimate.high)]}


def _round(value: float) -> float:
    return round(float(value), 5)


_MOST_CLASSES = 40


def write_probe(path: Path, report: ProbeReport) -> None:
    """Write the page. It asks for nothing from outside.

    Args:
        path: of the page.
        report: what was measured.
    """
    write_sections(
        path,
        title=f"What {report.labeled.side.name} knows of {report.settings.label!r}",
        lead=report.line(),
        warnings=report.warnings(),
        sections=[_accuracy(report), *([_few_shots(report)] if report.few_shots else []), _classes(report)],
    )


def _accuracy(report: ProbeReport) -> Section:
    notes = [f"{score.method}: {_about(score.method)}" for score in report.scores]
    notes.append("Vectors have length 1; for what is linear they are then centered, and divided by one number.")
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
    best, data = max(report.scores, key=lambda score: score.accuracy.value), report.labeled
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
    for score, color in zip(report.scores, COLOURS * len(report.scores), strict=False):
        found = sorted((one for one in report.few_shots if one.method == score.method), key=lambda one: one.shots)
        values = [one.accuracy for one in found]
        axes.fill_between(
            shots, [v.low for v in values], [v.high for v in values], color=color, alpha=0.15, linewidth=0
        )
        axes.plot(shots, [v.value for v in values], "o-", color=color, markersize=4, label=score.method)
        axes.axhline(score.accuracy.value, color=color, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shots))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shots, list(map(str, shots)))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color=GRID)
    label(axes, "training items a class; dashes: all of them", "top-1 accuracy")
    figure.legend(frameon=False, labelcolor=INK, loc="outside upper right", ncols=4)
    return svg(figure)
