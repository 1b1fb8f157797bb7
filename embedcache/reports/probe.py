"""The presentation of a probe: accuracies beside chance, the few-shot curve, and each class."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

import numpy as np

from embedcache.evaluate.classifiers import METHODS
from embedcache.evaluate.probe import Control, ProbeReport, Score
from embedcache.metrics import Estimate
from embedcache.reports.figures import COLORS, GRID, INK, label, open_axes, svg
from embedcache.reports.render import (
    Presentation,
    Section,
    Table,
    clip_benchmark_json,
    format_count,
    format_fraction,
    interval_json,
    round_json,
)
from embedcache.reports.zero_shot import accuracy_bars, class_bars

_PREFIXES = {"logistic": "lp"}  # CLIP_benchmark's name for its linear probe
_CHOSEN = {"C": "C = {:g}", "shrinkage": "shrinkage {:g}"}
_MAX_CLASSES = 40


def probe_table(report: ProbeReport) -> Table:
    """Return accuracies: one row per method, one per control, and two for guessing without a feature."""
    rows = []
    for score in report.scores:
        chosen = []
        for name, text in _CHOSEN.items():
            # A method has the settings of its own kind only.
            if name in score.chosen:
                chosen.append(text.format(score.chosen[name]))
        rows.append(
            [
                score.method,
                str(score.accuracy),
                format_fraction(score.top5),
                str(score.mean_per_class),
                ", ".join(chosen),
            ]
        )

    for control in report.controls:
        rows.append([control_name(control), str(control.accuracy), "", "", ""])
    majority = format_fraction(report.majority)
    uniform = format_fraction(report.uniform)
    rows.append(["the most frequent class", majority, "", uniform, ""])
    rows.append(["a class at random", uniform, "", uniform, ""])
    return ["", "top-1 [95%]", "top-5", "mean per class [95%]", "chosen on validation"], rows


def control_name(control: Control) -> str:
    """Return the name of a shuffled-label control with the range of its accuracies."""
    low = format_fraction(min(control.by_shuffle))
    high = format_fraction(max(control.by_shuffle))
    return f"{control.method}, labels shuffled {len(control.by_shuffle)} times ({low} to {high})"


def few_shot_table(report: ProbeReport) -> Table:
    """Return few-shot accuracies: one row per method, one column per number of training items per class."""
    shots = _shots(report)
    accuracies: dict[str, dict[int, str]] = {}
    for result in report.few_shots:
        accuracies.setdefault(result.method, {})[result.shots] = str(result.accuracy)

    rows = []
    for method, by_shots in accuracies.items():
        rows.append([method, *map(by_shots.__getitem__, shots)])
    return ["top-1 [95%]", *map("{} per class".format, shots)], rows


def _shots(report: ProbeReport) -> list[int]:
    """Return the numbers of training items per class, ascending."""
    return sorted({result.shots for result in report.few_shots})


def probe_json(report: ProbeReport, dataset: str) -> dict[str, Any]:
    """Return a report as JSON values with the keys of CLIP_benchmark's files; `details` contains everything else.

    Metrics of logistic regression begin with CLIP_benchmark's `lp_`, and metrics of other methods with the method's
    name.
    """
    feature = report.labeled.feature
    metrics: dict[str, float | None] = {}
    task = "knn"
    for score in report.scores:
        prefix = _PREFIXES.get(score.method, score.method)
        metrics[f"{prefix}_acc1"] = round_json(score.accuracy.value)
        metrics[f"{prefix}_acc5"] = round_json(score.top5)
        metrics[f"{prefix}_mean_per_class_recall"] = round_json(score.mean_per_class.value)
        if score.method != "knn":
            task = "linear_probe"

    return clip_benchmark_json(
        task,
        metrics,
        _details(report),
        dataset=dataset,
        model=feature.spec,
        # Models that come without a hub have no revision.
        pretrained=feature.fingerprint.get("revision") or f"sha256:{feature.fingerprint['weights'][:16]}",
    )


def _details(report: ProbeReport) -> dict[str, Any]:
    data = report.labeled
    settings = report.settings
    few_shots: dict[str, dict[str, Any]] = {}
    for result in report.few_shots:
        few_shots.setdefault(result.method, {})[str(result.shots)] = _accuracy_json(result.accuracy)

    shuffled = {}
    for control in report.controls:
        by_shuffle = list(map(round_json, control.by_shuffle))
        shuffled[control.method] = {**_accuracy_json(control.accuracy), "by_shuffle": by_shuffle}

    return {
        "feature": data.feature.name,
        "modality": data.feature.modality,
        "mean_of_tokens": data.feature.has_tokens,
        "fingerprint": dict(data.feature.fingerprint),
        "label": settings.label,
        "part": settings.part,
        "selection": None if settings.selection is None else str(settings.selection),
        "cut": data.split_rule,
        "seed": settings.seed,
        "num_items": report.counts,
        "num_unlabelled": data.num_unlabeled,
        "num_left_out": data.num_left_out,
        "num_classes": len(data.names),
        "overlap": asdict(report.overlap) if report.overlap else None,
        "warnings": report.warnings(),
        "chance": {"majority_acc1": round_json(report.majority), "uniform_acc1": round_json(report.uniform)},
        "methods": {score.method: _score_json(score, data.names) for score in report.scores},
        "shuffled_labels": shuffled,
        "few_shot": few_shots,
        "few_shot_draws": settings.draws if settings.shots else 0,
    }


def _score_json(score: Score, names: Sequence[str]) -> dict[str, Any]:
    return {
        **_accuracy_json(score.accuracy),
        "acc5": round_json(score.top5),
        "mean_per_class_recall": round_json(score.mean_per_class.value),
        "mean_per_class_interval": interval_json(score.mean_per_class),
        "chosen": dict(score.chosen),
        "recall": dict(zip(names, map(round_json, score.recalls), strict=True)),
    }


def _accuracy_json(estimate: Estimate) -> dict[str, Any]:
    return {"acc1": round_json(estimate.value), "interval": interval_json(estimate)}


def present_probe(report: ProbeReport, dataset: str) -> Presentation:
    """Return the presentation of a report, with the few-shot curve and each class."""
    sections = [_accuracy_section(report)]
    if report.few_shots:
        few_shot = Section(
            title="Few items per class",
            notes=[
                f"Fitted on that many training items per class, {report.settings.draws} draws, at a fixed "
                "regularization strength; intervals are over draws and test items."
            ],
            table=few_shot_table(report),
            figures=lambda: [_few_shot_curve(report)],
        )
        sections.append(few_shot)

    return Presentation(
        title=f"How well {report.labeled.feature.name} predicts {report.settings.label!r}",
        lines=[report.line()],
        warnings=report.warnings(),
        sections=[*sections, _class_section(report)],
        record=lambda: probe_json(report, dataset),
    )


def _accuracy_section(report: ProbeReport) -> Section:
    notes = []
    bars = {}
    for score in report.scores:
        # The docstring of a plug-in's method describes it on the page.
        description = METHODS.load(score.method).__doc__ or "a method of your own"
        notes.append(f"{score.method}: {description.strip().splitlines()[0]}")
        bars[score.method] = score.accuracy

    notes.append("Vectors have length 1; linear methods then center them and divide by one number.")
    if report.controls:
        notes.append(
            "Labels shuffled: fitted the same way on training labels in random order. The mean must be at the chance "
            "level; a single shuffle need not be, because a classifier assigns most of a class to one label. Intervals "
            "include the variation between shuffles."
        )
    for control in report.controls:
        bars[f"{control.method}, labels shuffled"] = control.accuracy

    return Section(
        title="Accuracy on the test items",
        notes=notes,
        table=probe_table(report),
        figures=lambda: [accuracy_bars(bars, max(report.majority, report.uniform))],
    )


def _class_section(report: ProbeReport) -> Section:
    data = report.labeled
    best = max(report.scores, key=lambda score: score.accuracy.value)
    count_C = np.bincount(data.examples.labels[data.rows("test")], minlength=len(data.names))

    # A class without test items has no recall and is not listed.
    hardest = np.argsort(best.recalls, kind="stable")
    hardest = hardest[count_C[hardest] > 0]
    num_shown = min(len(hardest), _MAX_CLASSES)
    rows = []
    for number in hardest[:num_shown].tolist():
        recalls = [format_fraction(score.recalls[number]) for score in report.scores]
        rows.append([data.names[number], format_count(count_C[number]), *recalls])

    listed = f"The {num_shown} hardest of {len(hardest):,}" if num_shown < len(hardest) else "All"
    return Section(
        title="Each class",
        notes=[f"{listed} classes, the hardest for {best.method} first; the figure shows {best.method}."],
        table=(["", "test items", *(score.method for score in report.scores)], rows),
        num_printed=0,
        figures=lambda: [class_bars(data.names, best.recalls, max(report.majority, report.uniform))],
    )


def _few_shot_curve(report: ProbeReport) -> str:
    """Draw accuracy by training items per class, and the accuracy with all of them dashed, as an SVG element."""
    shots = _shots(report)
    axes = open_axes(3.6)
    for score, color in zip(report.scores, cycle(COLORS), strict=False):
        values = []
        lows = []
        highs = []
        for result in sorted(report.few_shots, key=lambda result: result.shots):
            if result.method == score.method:
                values.append(result.accuracy.value)
                lows.append(result.accuracy.low)
                highs.append(result.accuracy.high)

        axes.fill_between(shots, lows, highs, color=color, alpha=0.15, linewidth=0)
        axes.plot(shots, values, "o-", color=color, markersize=4, label=score.method)
        axes.axhline(score.accuracy.value, color=color, linestyle="--", linewidth=1)

    # Numbers of items are powers of two by default. Their own ticks replace those of the scale.
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, list(map(str, shots)))
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color=GRID)
    label(axes, "training items per class; dashed: all of them", "top-1 accuracy")
    axes.figure.legend(frameon=False, labelcolor=INK, loc="outside upper right", ncols=4)
    return svg(axes.figure)
