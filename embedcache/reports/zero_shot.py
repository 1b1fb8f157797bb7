"""Zero-shot figures as rows to print and as JSON.

Zero-shot classification as one page: figures, and images to look at.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.evaluate.zero_shot import Classified, ZeroShotReport
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Case, Section, Shown, write_sections
from embedcache.reports.plots import accuracy_bars, class_bars, confusion_map
from embedcache.reports.retrieval import format_estimate
from embedcache.reports.thumbnails import Pictures, credit
from embedcache.store.cache import Cache

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
        "num_unlabelled": report.num_unlabeled,
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


_NUM_EACH = 6


def write_zero_shot(
    path: Path, cache: Cache, reports: Mapping[str, ZeroShotReport], classified: Classified, *, seed: int = 0
) -> None:
    """Write the page of some reports; classes and images are those of the first.

    Args:
        path: of the page.
        cache: that was measured.
        reports: a name -> figures, the first is the one to look at.
        classified: whose images are shown.
        seed: of drawing them.
    """
    first = next(iter(reports.values()))
    bars = {name: report.accuracies["acc1"] for name, report in reports.items()}
    write_sections(
        path,
        credit=credit(cache),
        title="Zero-shot classification",
        lead=f"{cache.path.name}, {first.line()}.",
        warnings=[f"{name}: {report.warning}" for name, report in reports.items() if report.warning],
        sections=[
            Section(
                title="Accuracy",
                notes=[
                    "In brackets the 95 % interval; for chance, where 95 % of random guesses lie.",
                    *(f"{name}: {report.overlap.line()}." for name, report in reports.items() if report.overlap),
                ],
                table=zero_shot_rows(reports),
                figures=[accuracy_bars(bars, chance=first.chance["acc1"].value)],
            ),
            Section(
                title="Classes",
                figures=[class_bars(first.names, first.by_class, chance=first.chance["acc1"].value)],
            ),
            Section(
                title="Confusions",
                notes=["All runs together."],
                table=confused_rows(first),
                figures=[confusion_map(first.names, first.confusion)],
            ),
            _images(cache, classified, seed),
        ],
    )


def _images(cache: Cache, classified: Classified, seed: int) -> Section:
    pictures, rng = Pictures(cache), np.random.default_rng(seed)
    is_right = classified.predicted[:, 0] == classified.labels
    drawn = [place for kind in (is_right, ~is_right) for place in rng.permutation(np.flatnonzero(kind))[:_NUM_EACH]]
    return Section(
        title="Images",
        notes=["Drawn at random: first images whose top class is right, then images whose top class is wrong."],
        cases=[_case(classified, pictures, int(place)) for place in drawn],
    )


def _case(classified: Classified, pictures: Pictures, place: int) -> Case:
    true, best = int(classified.labels[place]), classified.predicted[place].tolist()
    rank = int(classified.ranks[place])
    return Case(
        query=Shown(picture=pictures.data_url(int(classified.items.rows[place])), text=classified.names[true]),
        said="right at rank 1" if best[0] == true else f"its class at rank {rank:,}",
        is_right=best[0] == true,
        shown=[Shown(text=classified.names[number], is_right=number == true) for number in best],
        answer=None if true in best else Shown(text=classified.names[true], is_right=True),
    )
