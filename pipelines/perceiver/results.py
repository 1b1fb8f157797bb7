"""Results of one likelihood for every task: on disk, and as tables over seeds."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from embedcache.errors import DataError
from embedcache.evaluate.likelihood import Measured
from embedcache.files import write_atomic
from embedcache.metrics.intervals import Estimate, bootstrap_runs
from embedcache.reports.base import Table

PRETRAINED, ZERO_SHOT = "pre-trained", "pre-trained, not tuned"
FEATURE_PROBE, NETWORK_PROBE = "linear probe, cached features", "linear probe, pre-trained network"
BLIND_DRAW, BLIND_ALL = "blind, these answers", "blind, all training answers"
Measures: TypeAlias = Mapping[str, Measured]


def question_name(data: str, fraction: float) -> str:
    """Return the name of a question about data that pre-training has not, given a fraction of its training examples."""
    return f"{data} {100 * fraction:g} %"


def file_name(name: str) -> str:
    """Return a name of a file or folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one question with one seed.

    Args:
        seed: seed of the run.
        num_examples: number of examples.
        measures: metric -> its values.
        num_trained: number of examples that the model was tuned or fitted on.
        model: name of the row in tables.
        question: what is measured.
        weights: SHA-256 of the weights of the runs that it was measured on, joined by `+`.
        controls: control -> metric -> its values.
        chance: metric -> its value for a random order of the candidates.
        captions: key of an image -> its caption, of some.
    """

    seed: int
    num_examples: int
    measures: Measures
    num_trained: int = 0
    model: str = ""
    question: str = ""
    weights: str = ""
    controls: Mapping[str, Measures] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        controls = {name: _to_json(measures) for name, measures in self.controls.items()}
        values = {**vars(self), "measures": _to_json(self.measures), "controls": controls}
        write_atomic(path, json.dumps(values).encode())

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a result that `write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text())
        controls = {name: _from_json(measures) for name, measures in values["controls"].items()}
        return cls(**{**values, "measures": _from_json(values["measures"]), "controls": controls})


def _to_json(measures: Measures) -> dict[str, list[list[int]]]:
    return {
        name: [np.asarray(item.values_M, int).tolist(), item.clusters_M.tolist()] for name, item in measures.items()
    }


def _from_json(measures: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Measured]:
    return {name: Measured(*(np.array(row, np.int64) for row in rows)) for name, rows in measures.items()}


class Results:
    """Results of several models, questions and seeds."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results: dict[tuple[str, str], list[Result]] = {}
        self._estimates: dict[tuple[str, str, str, str | None], Estimate | None] = {}
        for result in sorted(results, key=lambda result: result.seed):
            self._results.setdefault((result.question, result.model), []).append(result)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Read the results of all seeds in the folder of the pipeline."""
        return cls(Result.read(path) for path in sorted(folder.glob("seed*/results/*.json")))

    def models(self, question: str) -> list[str]:
        """Return the models with results on a question."""
        return [model for asked, model in self._results if asked == question]

    def seeds(self, model: str, question: str) -> list[Result]:
        """Return the results of a model on a question, one per seed.

        Raises:
            DataError: there are none.
        """
        if (question, model) not in self._results:
            known = ", ".join(self.models(question)) or "nothing"
            raise DataError(f"expected a result of {known} on {question}, got {model!r}")
        return self._results[question, model]

    def estimate(self, model: str, question: str, measure: str, *, control: str | None = None) -> Estimate | None:
        """Return the mean over seeds with a 95% interval over seeds and items; None if that was not measured."""
        key = model, question, measure, control
        if key not in self._estimates:
            self._estimates[key] = self._estimate(*key)
        return self._estimates[key]

    def _estimate(self, model: str, question: str, measure: str, control: str | None) -> Estimate | None:
        found = []
        for result in self.seeds(model, question):
            measures = result.measures if control is None else result.controls.get(control, {})
            if measure in measures:
                found.append(measures[measure])
        if not found:
            return None
        if any(not np.array_equal(item.clusters_M, found[0].clusters_M) for item in found):
            raise DataError(f"{model} on {question}: expected the same items for all seeds, got different ones")
        return bootstrap_runs(np.stack([item.values_M.astype(np.float64) for item in found]), found[0].clusters_M)


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
