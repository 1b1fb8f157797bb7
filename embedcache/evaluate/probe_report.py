"""A probe's figures as rows to print and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.evaluate.probe import Control, FewShot, ProbeReport, Score
from embedcache.evaluate.report import format_estimate
from embedcache.metrics.intervals import Estimate

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
    side = report.labelled.side
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
    data, settings = report.labelled, report.settings
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
        "num_unlabelled": data.num_unlabelled,
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
