"""Zero-shot figures as rows to print and as JSON."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from embedcache.evaluate.report import format_estimate
from embedcache.evaluate.zero_shot import ZeroShotReport
from embedcache.metrics.intervals import Estimate

_COLUMNS = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "mean per class"}


def zero_shot_rows(reports: Mapping[str, ZeroShotReport]) -> tuple[list[str], list[list[str]]]:
    """Lay reports out as a table: one row each, and a last row of what chance gives on the first one's images."""
    rows = [[name, *_cells(report.accuracies)] for name, report in reports.items()]
    chance = next(iter(reports.values())).chance
    return ["", *_COLUMNS.values()], [*rows, ["chance", *_cells(chance)]]


def confused_rows(report: ZeroShotReport, *, most: int = 10) -> tuple[list[str], list[list[str]]]:
    """List the classes that are most often taken for another one."""
    counts_CC = report.confusion.copy()
    np.fill_diagonal(counts_CC, 0)
    order = np.argsort(-counts_CC, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(place, counts_CC.shape) for place in order if counts_CC.flat[place]]
    totals_C = report.confusion.sum(axis=1)
    rows = [
        [
            report.names[true],
            report.names[taken],
            f"{counts_CC[true, taken]:,}",
            f"{100 * counts_CC[true, taken] / totals_C[true]:.1f} %",
        ]
        for true, taken in pairs
    ]
    return ["class", "taken for", "images", "of the class"], rows


def zero_shot_json(report: ZeroShotReport) -> dict[str, Any]:
    """Give the figures as JSON values: accuracies with intervals, chance, each class, counts, seeds and overlap."""
    return {
        **_json(report.accuracies),
        "chance": _json(report.chance),
        "by_class": {
            name: None if np.isnan(accuracy) else round(float(accuracy), 5)
            for name, accuracy in zip(_unique(report.names), report.by_class, strict=True)
        },
        "acc1_by_seed": [round(accuracy, 5) for accuracy in report.by_seed],
        "num_images": report.num_images,
        "num_unlabelled": report.num_unlabelled,
        "num_classes": len(report.names),
        "num_prompts": list(report.num_prompts),
        "seeds": report.seeds,
        "part": report.part,
        "overlap": report.overlap.to_json() if report.overlap else None,
    }


def _unique(names: list[str]) -> list[str]:
    """Number names that stand twice."""
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names)]


def _cells(figures: Mapping[str, Estimate]) -> list[str]:
    return [format_estimate(figures[name]) for name in _COLUMNS]


def _json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    return {
        **{name: round(estimate.value, 5) for name, estimate in figures.items()},
        "intervals": {name: [round(one.low, 5), round(one.high, 5)] for name, one in figures.items()},
    }
