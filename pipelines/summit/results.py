"""Results of adaptation as tables: per scenario, and over all scenarios."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.provenance import construct
from embedcache.reports.render import Table
from pipelines.results import read_step, write_step
from pipelines.summit.metrics import bootstrap_iou_difference, mean_iou
from pipelines.summit.steps import ORACLE, SOURCE, VIEWS

BOTH = "2D+3D"
_SHORT = {"norm statistics": "norms", "norm statistics by the gap": "norms by gap", "source only": "source"}
_MARGIN = 0.005
"""A mean IoU that is lower by more than this counts as harm."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One scenario in one world with one seed.

    Args:
        gaps: modality -> gap.
        counts: method -> view -> (G, C, C) confusion counts per test frame.
    """

    scenario: str
    world: int
    seed: int
    gaps: Mapping[str, float]
    counts: Mapping[str, Mapping[str, Ints]]

    def write(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write the result with the settings that it was computed with."""
        counts = {method: _to_lists(views) for method, views in self.counts.items()}
        write_step(path, settings, {**vars(self), "counts": counts})

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> "Result | None":
        """Read a result that `write` wrote. Returns None if there is none, or if its settings differ."""
        values = read_step(path, settings)
        return None if values is None else construct(path, partial(cls._from_values, values))

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "Result":
        counts = {method: _to_arrays(views) for method, views in values["counts"].items()}
        return cls(**{**values, "counts": counts})

    def iou(self, method: str, view: str = BOTH) -> float:
        """Return the mean IoU of a method over all test frames."""
        return mean_iou(self.counts[method][view].sum(axis=0))

    def gain(self, method: str, view: str = BOTH) -> float:
        """Return the gain in mean IoU over the source models."""
        return self.iou(method, view) - self.iou(SOURCE, view)

    def line(self, method: str) -> str:
        """Return the change by a method in one line."""
        gaps = " / ".join(f"{gap:.2f}" for gap in self.gaps.values())
        ious = " / ".join(f"{100 * self.iou(SOURCE, view):.1f} to {100 * self.iou(method, view):.1f}" for view in VIEWS)
        return f"{self.scenario}: gaps {gaps}; 2D / 3D / 2D+3D from {ious}"

    def is_harmed(self, method: str, view: str) -> bool:
        """Return whether the mean IoU falls by more than 0.5 points, even at the upper end of its interval."""
        counts = self.counts[method][view], self.counts[SOURCE][view]
        return self.gain(method, view) < -_MARGIN and bootstrap_iou_difference(*counts).high < -_MARGIN


def _to_lists(views: Mapping[str, Ints]) -> dict[str, list[Any]]:
    return {view: counts.tolist() for view, counts in views.items()}


def _to_arrays(views: Mapping[str, Any]) -> dict[str, Ints]:
    return {view: np.array(counts) for view, counts in views.items()}


def summary_table(results: Sequence[Result], methods: Iterable[str]) -> Table:
    """Return the change of 2D+3D by each method against the source models over all results, and the harm it does."""
    columns = [
        "",
        "2D+3D",
        "change",
        "better by > 2",
        "worse by > 0.5",
        "any view worse",
        "beyond interval",
        "to oracle",
    ]

    # Gains are summed before they are divided: single distances to the oracle can be near 0.
    distance = sum(result.gain(ORACLE) for result in results)

    views = [(result, view) for result in results for view in VIEWS]

    rows = []
    for method in methods:
        gains = np.array([result.gain(method) for result in results])
        num_worse = sum(result.gain(method, view) < -_MARGIN for result, view in views)
        num_harmed = sum(result.is_harmed(method, view) for result, view in views)
        rows.append([
            method,
            _points(np.mean([result.iou(method) for result in results])),
            f"{100 * gains.mean():+.1f}",
            f"{(gains > 0.02).sum()} of {len(gains)}",
            f"{(gains < -_MARGIN).sum()} of {len(gains)}",
            f"{num_worse} of {len(views)}",
            f"{num_harmed} of {len(views)}",
            f"{gains.sum() / distance:.0%}" if distance else "",
        ])  # fmt: skip
    return columns, rows


def scenario_table(results: Sequence[Result], methods: Sequence[str]) -> Table:
    """Return the mean IoU of 2D / 3D / 2D+3D per scenario and method, and the gaps, as means over worlds and seeds."""
    rows = []
    for scenario in dict.fromkeys(result.scenario for result in results):
        runs = [result for result in results if result.scenario == scenario]
        gaps = [np.mean([result.gaps[name] for result in runs]) for name in ("image", "points")]
        cells = []
        for method in methods:
            means = [np.mean([result.iou(method, view) for result in runs]) for view in VIEWS]
            cells.append(" / ".join(f"{100 * mean:.0f}" for mean in means))
        rows.append([scenario, " / ".join(f"{gap:.2f}" for gap in gaps), *cells])
    return ["", "gap 2D / 3D", *(_SHORT.get(method, method) for method in methods)], rows


def _points(fraction: float | np.floating[Any]) -> str:
    return f"{100 * fraction:.1f}"
