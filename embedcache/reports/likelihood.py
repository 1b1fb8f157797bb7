"""Tasks of one likelihood as a table and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from embedcache.evaluate.likelihood import TaskReport, estimate_runs
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Table, estimate_json, format_estimate, format_fraction, round_json

Reports: TypeAlias = Mapping[str, Mapping[str, Sequence[TaskReport]]]
"""Recipe -> task -> a report per seed."""


def likelihood_table(reports: Reports) -> Table:
    """Return all measures with 95% intervals: one row per recipe, task and measure; controls and chance beside it."""
    controls = list(
        dict.fromkeys(name for tasks in reports.values() for seeds in tasks.values() for name in seeds[0].controls)
    )
    rows = []
    for recipe, tasks in reports.items():
        for task, seeds in tasks.items():
            for measure in seeds[0].measures:
                cells = [_estimate(seeds, measure), *(_estimate(seeds, measure, control) for control in controls)]
                texts = ["" if cell is None else format_estimate(cell) for cell in cells]
                chance = format_fraction(seeds[0].chance.get(measure))
                rows.append([recipe, task, f"{seeds[0].num_examples:,}", measure, *texts, chance])
    return ["run", "task", "examples", "measure", "value", *controls, "chance"], rows


def likelihood_json(reports: Reports, dataset: str) -> dict[str, Any]:
    """Return reports as JSON values: the measures, controls and captions of each recipe and task."""
    return {
        "dataset": dataset,
        "task": "likelihood",
        "models": [
            {
                "model": recipe,
                "runs": [str(report.run_path) for report in next(iter(tasks.values()))],
                "tasks": [_task_json(seeds) for seeds in tasks.values()],
            }
            for recipe, tasks in reports.items()
        ],
    }


def _task_json(seeds: Sequence[TaskReport]) -> dict[str, Any]:
    first = seeds[0]
    return {
        "task": first.task,
        "kind": first.kind,
        "num_examples": first.num_examples,
        "measures": {name: _measure_json(seeds, name) for name in first.measures},
        "controls": {
            control: {name: _measure_json(seeds, name, control) for name in measures}
            for control, measures in first.controls.items()
        },
        "chance": {name: round_json(value) for name, value in first.chance.items()},
        "captions": dict(first.captions),
        "warnings": [line for report in seeds for line in report.warnings()],
    }


def _estimate(seeds: Sequence[TaskReport], measure: str, control: str | None = None) -> Estimate | None:
    """Return the mean of a measure over seeds with its interval over items and seeds; None if a control lacks it."""
    if control is not None and measure not in seeds[0].controls.get(control, {}):
        return None
    measured = seeds[0].measures[measure] if control is None else seeds[0].controls[control][measure]
    return measured.estimate() if len(seeds) == 1 else estimate_runs(seeds, measure, control=control)


def _measure_json(seeds: Sequence[TaskReport], measure: str, control: str | None = None) -> dict[str, Any] | None:
    estimate = _estimate(seeds, measure, control)
    return None if estimate is None else estimate_json(estimate)
