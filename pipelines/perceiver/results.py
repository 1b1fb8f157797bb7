"""Results of one likelihood for every task: on disk, as tables over seeds, and as a page."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedcache.errors import DataError
from embedcache.evaluate.likelihood import BLIND, SHUFFLED, Measured
from embedcache.files import write_atomic
from embedcache.metrics.intervals import Estimate, bootstrap_runs
from embedcache.reports.base import Section, Table, write_report
from pipelines.common import markdown_table

PRETRAINED, ZERO_SHOT = "pre-trained", "pre-trained, no answers"
FEATURE_PROBE, NETWORK_PROBE = "linear probe, cached features", "linear probe, pre-trained network"
BLIND_DRAW, BLIND_ALL = "blind, these answers", "blind, all training answers"
Measures: TypeAlias = Mapping[str, Measured]
TITLE = "One likelihood for every task on cached features"
NOTES = (
    'One small transformer on features of frozen encoders answers every task by the same likelihood, as in "'
    'Uni-Perceiver: Pre-training Unified Architecture for Generic Perception for Zero-shot and Few-shot Tasks" (CVPR '
    "2022). It is pre-trained on synthetic images of shapes (their classes, captions, masked words, and statements of "
    "what is absent) and on descriptions whose classes are to be found, all together. Then it answers questions about "
    "the images of easy-VQA, which pre-training has not: neither images nor questions nor answers.",
    "Tuning trains on a draw of the training answers, stratified by kind and answer. Prompts are on keys and values, "
    "and LayerNorms, scales and a head are trained with them; the transformer stays as it is. The epoch is chosen on "
    "validation images, whose answers are not in the draw. Linear probes are logistic regression with fixed "
    "regularization. Blind: the most frequent answer of each question.",
    "What cannot be concluded: shapes are synthetic, and no figure of the paper is repeated. A network that was never "
    "pre-trained, tuned by prompts, is the control of what prompts, norms and head learn by themselves.",
)
_GROUPS = ("accuracy", "accuracy: open", "accuracy: yes-no", "accuracy: negated")


def answers_name(fraction: float) -> str:
    """Return the name of the question: easy-VQA with a fraction of its training answers."""
    return f"easy-VQA {100 * fraction:g} %"


def file_name(name: str) -> str:
    """Return a name of a file or folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one question with one seed.

    Args:
        model: name of the row in tables.
        question: what is measured.
        seed: seed of the run.
        num_examples: number of examples.
        measures: metric -> its values.
        controls: control -> metric -> its values.
        chance: metric -> its value for a random order of the candidates.
        captions: key of an image -> its caption, of some.
    """

    model: str
    question: str
    seed: int
    num_examples: int
    measures: Measures
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


def answer_table(results: Results, fraction: float, models: Sequence[str]) -> Table:
    """Return the accuracy of models with a fraction of the answers, by kind of question, and controls, in percent."""
    groups = [name.removeprefix("accuracy: ").replace("accuracy", "all") for name in _GROUPS]
    columns = ["accuracy in %", *groups, f"open, {SHUFFLED}", f"open, {BLIND}"]
    rows = []
    for question, model in [(answers_name(0), ZERO_SHOT), *((answers_name(fraction), model) for model in models)]:
        if model in results.models(question):
            cells = [results.estimate(model, question, measure) for measure in _GROUPS]
            cells += [results.estimate(model, question, _GROUPS[1], control=name) for name in (SHUFFLED, BLIND)]
            rows.append([model, *map(_percent, cells)])
    return columns, rows


def write_pages(
    folder: Path, results: Results, questions: Sequence[str], models: Sequence[str], fractions: Sequence[float]
) -> None:
    """Write `uniperceiver.html` and `uniperceiver.md` into the folder.

    Args:
        folder: folder of the pages.
        results: results of all seeds.
        questions: what was measured on the pre-trained run.
        models: models that answer easy-VQA.
        fractions: fractions of the answers.
    """
    seeds = [result.seed for result in results.seeds(PRETRAINED, questions[0])]
    averaged = (
        f"Seed {seeds[0]} alone, with 95% intervals over items."
        if len(seeds) == 1
        else f"Means over the seeds {', '.join(map(str, seeds))}, with 95% intervals over seeds and items."
    )
    sections = [("Tasks of pre-training", [averaged], pretraining_table(results, questions))]
    for fraction in fractions:
        note = "The control of open questions has the image of another question, or none."
        title = f"easy-VQA with {100 * fraction:g} % of its answers"
        sections.append((title, [averaged, note], answer_table(results, fraction, models)))
    captions = results.seeds(PRETRAINED, "captions")[0].captions
    sections.append(
        ("Captions", ["The first test images."], (["image", "caption"], [[*row] for row in captions.items()]))
    )
    write_report(
        folder / "uniperceiver.html",
        title=TITLE,
        summary=summarize(results, fractions),
        sections=[
            Section(title="What is compared", notes=NOTES),
            *(Section(title=title, notes=notes, table=table) for title, notes, table in sections),
        ],
    )
    blocks = [f"# {TITLE}", *NOTES, summarize(results, fractions)]
    for title, notes, (columns, rows) in sections:
        blocks += [f"## {title}", *notes, markdown_table(columns, rows)]
    write_atomic(folder / "uniperceiver.md", ("\n\n".join(blocks) + "\n").encode())


def summarize(results: Results, fractions: Sequence[float]) -> str:
    """Return the accuracy on open questions of easy-VQA of each model in a few sentences."""
    lines = []
    for fraction in fractions:
        question = answers_name(fraction)
        found = {model: results.estimate(model, question, _GROUPS[1]) for model in results.models(question)}
        rates = [f"{model} {100 * item.value:.1f}" for model, item in found.items() if item is not None]
        lines.append(f"With {100 * fraction:g} % of the answers: {'; '.join(rates)}.")
    return " ".join(["Accuracy on open questions of easy-VQA in percent.", *lines])


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
