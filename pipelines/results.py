"""Results of pipelines: values on disk with their digest, estimates over seeds, and a page in HTML and Markdown."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from embedcache.arrays import Array
from embedcache.errors import CorruptError, DataError
from embedcache.files import write_atomic
from embedcache.metrics import Estimate, MetricValues, interval_of, resample_runs
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import DIGEST, add_digest, construct, read_record
from embedcache.reports.figures import svg
from embedcache.reports.render import Presentation, Section, Table, interval_json, round_json, write_page
from pipelines.common import markdown_table, save_figure

_NEXT_STEP = "delete it, and it is computed again"


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values with their digest, atomically."""
    write_atomic(path, (json.dumps(add_digest(values)) + "\n").encode())


def read_values(path: Path) -> dict[str, Any]:
    """Read what `write_values` wrote.

    Raises:
        PathError: the file does not exist.
        CorruptError: it has changed since it was written.
    """
    record = read_record(path, next_step=_NEXT_STEP)
    record.pop(DIGEST, None)
    return record


def write_step(path: Path, settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write the values of a step with its settings."""
    write_values(path, {"settings": settings, "values": values})


def read_step(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values of a step, or None if it was not computed with these settings.

    Raises:
        CorruptError: the file has changed since it was written.
    """
    if not path.is_file():
        return None

    record = read_values(path)

    # JSON turns tuples into lists, so the settings are compared as they are stored.
    if record.get("settings") != json.loads(json.dumps(settings)):
        return None
    if not isinstance(record.get("values"), dict):
        raise CorruptError(f"{path}: expected the values of a step; {_NEXT_STEP}")
    return dict(record["values"])


Measures: TypeAlias = Mapping[str, MetricValues]


def file_name(name: str) -> str:
    """Return a name of a file or folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one model on one question with one seed.

    Args:
        seed: seed of the run.
        num_examples: number of examples.
        measures: metric -> its values.
        num_trained: number of examples that the model was tuned or fitted on.
        model: name of the row in tables.
        question: name of the test.
        weights: SHA-256 of the weights of the measured runs, joined by `+`.
        controls: control -> metric -> its values.
        chance: metric -> its value for a random order of the candidates.
        captions: key of an image -> its caption, for some images.
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
        write_values(path, values)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a result that `write` wrote."""
        return construct(path, partial(cls._from_values, read_values(path)))

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "Result":
        controls = {name: _from_json(measures) for name, measures in values["controls"].items()}
        return cls(**{**values, "measures": _from_json(values["measures"]), "controls": controls})


def _to_json(measures: Measures) -> dict[str, list[list[int]]]:
    return {
        name: [np.asarray(item.values_M, int).tolist(), item.clusters_M.tolist()] for name, item in measures.items()
    }


def _from_json(measures: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, MetricValues]:
    values = {}
    for name, (values_M, clusters_M) in measures.items():
        values[name] = MetricValues(np.array(values_M, np.int64), np.array(clusters_M, np.int64))
    return values


def keep_result(
    folder: Path, model: str, question: str, weights: str, compute: Callable[[], Result], progress: Progress | None
) -> Result:
    """Read the result of runs with these weights from the folder `results`, or compute and write it."""
    path = folder / "results" / f"{file_name(f'{question} {model}')}.json"
    if path.is_file():
        stored = Result.read(path)
        if stored.weights == weights:
            return stored

    progress = progress or NullProgress()
    progress.start(f"measuring {question}", 1, "results")
    result = replace(compute(), model=model, question=question, weights=weights)

    path.parent.mkdir(parents=True, exist_ok=True)
    result.write(path)
    progress.advance(1)
    progress.finish()
    return result


def with_both(result: Result) -> Result:
    """Return a result with the metric over both directions before those of each direction, if there are two."""
    if len(result.measures) == 1:
        return result

    values, clusters = zip(*result.measures.values(), strict=True)
    name = next(iter(result.measures)).split()[-1]
    joint = MetricValues(np.concatenate(values), np.concatenate(clusters))

    # Directions have different numbers of queries, and so different weights.
    num_queries = [len(value) for value in values]
    chance = np.average([result.chance[direction] for direction in result.measures], weights=num_queries)
    return replace(result, measures={name: joint, **result.measures}, chance={name: float(chance), **result.chance})


class Results:
    """Results of several models, questions and seeds."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results: dict[tuple[str, str], list[Result]] = {}
        self._estimates: dict[tuple[str, str, str, str | None], Estimate | None] = {}

        for result in sorted(results, key=lambda result: result.seed):
            self._results.setdefault((result.question, result.model), []).append(result)

    @classmethod
    def read(cls, folder: Path, *, seed: int | None = None) -> "Results":
        """Read the results of all seeds in the folder of the pipeline, or of one seed."""
        pattern = f"seed{'*' if seed is None else seed}/results/*.json"
        return cls(Result.read(path) for path in sorted(folder.glob(pattern)))

    def models(self, question: str) -> list[str]:
        """Return the models with results on a question."""
        return [model for name, model in self._results if name == question]

    def seeds(self, model: str, question: str) -> list[Result]:
        """Return the results of a model on a question, one per seed.

        Raises:
            DataError: there are no results.
        """
        if (question, model) not in self._results:
            available = ", ".join(self.models(question)) or "nothing"
            raise DataError(f"expected a result of {available} on {question}, got {model!r}")
        return self._results[question, model]

    def estimate(self, model: str, question: str, measure: str, *, control: str | None = None) -> Estimate | None:
        """Return the mean over seeds with a 95% interval over seeds and items, or None if it was not measured."""
        key = model, question, measure, control
        if key not in self._estimates:
            self._estimates[key] = self._estimate(*key)
        return self._estimates[key]

    def _estimate(self, model: str, question: str, measure: str, control: str | None) -> Estimate | None:
        values = []
        for result in self.seeds(model, question):
            measures = result.measures if control is None else result.controls.get(control, {})
            if measure in measures:
                values.append(measures[measure])
        return interval_of(_resample([values])[:, 0]) if values else None

    def resample(self, models: Sequence[tuple[str, str]], measure: str) -> Array:
        """Return means over seeds of K models on questions with the same items: of all items, then of resamples.

        Args:
            models: model and question of each column.
            measure: a metric of all of them.

        Returns:
            (1 + B, K), see `resample_runs`.

        Raises:
            DataError: columns have other seeds, or other items in a seed.
        """
        columns = [self.seeds(*names) for names in models]

        seeds = [", ".join(str(result.seed) for result in column) for column in columns]
        for (model, question), column_seeds in zip(models, seeds, strict=True):
            if column_seeds != seeds[0]:
                raise DataError(
                    f"expected the same seeds for all models on {question}, "
                    f"got {seeds[0]} of {models[0][0]}, {column_seeds} of {model}; run the pipeline again for all seeds"
                )

        return _resample([[result.measures[measure] for result in column] for column in columns])


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON values: `value` and `interval`."""
    return {"value": round_json(estimate.value), "interval": interval_json(estimate)}


def estimates_json(columns: Mapping[str, Array]) -> dict[str, Any]:
    """Return each column of `Results.resample`, or a difference of two, as JSON values: its mean and 95% interval."""
    return {name: estimate_json(interval_of(column_R)) for name, column_R in columns.items()}


def _resample(columns: Sequence[Sequence[MetricValues]]) -> Array:
    values = []
    clusters = []
    for seed_values in zip(*columns, strict=True):
        if any(not np.array_equal(item.clusters_M, seed_values[0].clusters_M) for item in seed_values):
            raise DataError("expected the same items for all models of a seed, got different ones")
        values.append(np.stack([item.values_M for item in seed_values], axis=1))
        clusters.append(seed_values[0].clusters_M)
    return resample_runs(values, clusters)


class Part(NamedTuple):
    """A section of the page: paragraphs, then a table or a figure. The file of the figure has the name."""

    title: str
    notes: Sequence[str]
    table: Table | None = None
    figure: Figure | None = None
    name: str = ""


def write_pages(
    path: Path, title: str, parts: Sequence[Part], *, notes: Sequence[str], summary: str = "", credit: str = ""
) -> None:
    """Write a page as HTML and as Markdown.

    Args:
        path: path of both files without their suffix. A figure is `PATH-NAME` with a suffix.
        title: title of the page.
        parts: sections.
        notes: explanations of the comparison.
        summary: findings in a few sentences.
        credit: authors and licenses of the data.
    """
    sections = [Section(title="What is compared", notes=_plain(notes))]
    for part in parts:
        figures = partial(_draw, part.figure) if part.figure else tuple
        sections.append(Section(title=part.title, notes=_plain(part.notes), table=part.table, figures=figures))

    if credit:
        sections.append(Section(title="Credits", notes=[credit]))

    page = Presentation(title=title, lines=[summary] if summary else [], sections=sections, record=dict)
    write_page(path.with_suffix(".html"), page)

    blocks = [f"# {title}", *notes, summary]
    for part in parts:
        blocks += [f"## {part.title}", *part.notes]
        blocks += [] if part.table is None else [markdown_table(*part.table)]
        if part.figure is not None:
            figure_name = save_figure(path.with_name(f"{path.name}-{part.name}"), part.figure)
            blocks.append(f"![{part.title}]({figure_name})")
    write_atomic(path.with_suffix(".md"), ("\n\n".join(filter(None, [*blocks, credit])) + "\n").encode())


def _draw(figure: Figure) -> list[str]:
    return [svg(figure)]


def _plain(notes: Sequence[str]) -> list[str]:
    """Return notes without the backticks of Markdown."""
    return [note.replace("`", "") for note in notes]
