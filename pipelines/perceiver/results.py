"""Results of one likelihood for every task, as tables over seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Table
from pipelines.results import Results

PRETRAINED, ZERO_SHOT = "pre-trained", "pre-trained, not tuned"
FEATURE_PROBE, NETWORK_PROBE = "linear probe, cached features", "linear probe, pre-trained network"
BLIND_DRAW, BLIND_ALL = "blind, these answers", "blind, all training answers"


def question_name(data: str, fraction: float) -> str:
    """Return the name of a question about downstream data, given a fraction of its training examples."""
    return f"{data} {100 * fraction:g} %"


def pretraining_table(results: Results, questions: Sequence[str]) -> Table:
    """Return each metric of the pre-trained run beside its controls and chance, in percent."""
    columns = ["in %", PRETRAINED, "control", "chance", "examples"]
    rows = []
    for question in questions:
        first = results.seeds(PRETRAINED, question)[0]
        for measure in first.measures:
            controls = {name: results.estimate(PRETRAINED, question, measure, control=name) for name in first.controls}
            shown = [f"{name}: {100 * found.value:.1f}" for name, found in controls.items() if found is not None]
            chance = first.chance.get(measure)
            rows.append([
                f"{question}: {measure}",
                _percent(results.estimate(PRETRAINED, question, measure)),
                "; ".join(shown),
                "" if chance is None else f"{100 * chance:.1f}",
                f"{first.num_examples:,}",
            ])  # fmt: skip
    return columns, rows


class Column(NamedTuple):
    """A column of a table of models: a metric, or that of a control."""

    title: str
    measure: str
    control: str | None = None


def model_table(
    results: Results, data: str, fraction: float, models: Sequence[str], columns: Sequence[Column]
) -> Table:
    """Return what models do with a fraction of some data, in percent; the first row has none of it, the last is chance.

    Models without results are left out.
    """
    rows: list[list[str]] = []
    chance: dict[str, float] = {}
    for question, model in [(question_name(data, 0), ZERO_SHOT), *((question_name(data, fraction), m) for m in models)]:
        if model in results.models(question):
            cells = [results.estimate(model, question, name, control=control) for _, name, control in columns]
            rows.append([model, *map(_percent, cells)])
            chance |= results.seeds(model, question)[0].chance
    values = [chance.get(name) if control is None else None for _, name, control in columns]
    if any(value is not None for value in values):
        rows.append(["chance", *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["in %", *(title for title, _, _ in columns)], rows


def interference_table(results: Results, questions: Mapping[str, str]) -> Table:
    """Return each metric of the run of all tasks, beside that of the run of its own task alone, in percent.

    Args:
        questions: question -> model that was trained on its task alone; those without results are left out.
    """
    rows = []
    for question, alone in questions.items():
        if alone not in results.models(question):
            continue
        result = results.seeds(alone, question)[0]
        together = next(found for found in results.seeds(PRETRAINED, question) if found.seed == result.seed)
        for measure, values in result.measures.items():
            pair = [found.estimate() for found in (together.measures[measure], values)]
            rows.append([f"{question}: {measure}", *map(_percent, pair)])
    return ["in %", "all tasks together", "one task alone"], rows


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
