"""Results of speech recognition on disk, and tables of error rates over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.errors import DataError
from embedcache.metrics.intervals import Estimate, bootstrap_runs
from embedcache.provenance import construct
from embedcache.reports.base import Table
from pipelines.avsr.edits import count_character_errors
from pipelines.avsr.figures import level_name, snr_db
from pipelines.avsr.utterances import clusters_of_characters
from pipelines.results import read_values, write_values


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one model of one seed recognizes in one test set.

    Args:
        model: name of the model, decoder and streams, such as `audio only`.
        test_set: name of the test set.
        seed: random seed of its training.
        weights: SHA-256 of its weights.
        cluster_noun: what the clusters of words are, such as `recordings`.
        clusters_M: cluster of each word.
        references: transcripts.
        words: view of the sound -> (M,) errors of each word.
        hypotheses: view of the sound -> what was recognized.
    """

    model: str
    test_set: str
    seed: int
    weights: str
    cluster_noun: str
    clusters_M: Ints
    references: Sequence[str]
    words: Mapping[str, Ints]
    hypotheses: Mapping[str, Sequence[str]]

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        words = {view: errors_M.tolist() for view, errors_M in self.words.items()}
        write_values(path, {**vars(self), "clusters_M": self.clusters_M.tolist(), "words": words})

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a result that `write` wrote."""
        return construct(path, partial(cls._from_values, read_values(path)))

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "Result":
        words = {view: np.array(errors, np.int64) for view, errors in values["words"].items()}
        return cls(**{**values, "clusters_M": np.array(values["clusters_M"], np.int64), "words": words})

    @cached_property
    def characters(self) -> Mapping[str, Ints]:
        """View of the sound -> errors of each character."""
        return {view: count_character_errors(self.references, texts) for view, texts in self.hypotheses.items()}


class Results:
    """Results of several models, test sets and seeds."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results: dict[tuple[str, str], list[Result]] = {}
        for result in sorted(results, key=lambda result: result.seed):
            self._results.setdefault((result.model, result.test_set), []).append(result)

    @classmethod
    def read(cls, folders: Iterable[Path]) -> "Results":
        """Read the results in the folders of some seeds."""
        return cls(Result.read(path) for folder in folders for path in sorted(folder.glob("results/*.json")))

    def seeds(self, model: str, test_set: str) -> list[Result]:
        """Return the results of a model in a test set, one per seed; DataError if there are none."""
        if (model, test_set) not in self._results:
            known = sorted({name for name, of_set in self._results if of_set == test_set})
            raise DataError(f"expected a result of {', '.join(known) or 'nothing'} in set {test_set}, got {model!r}")
        return self._results[model, test_set]

    def has(self, model: str, test_set: str) -> bool:
        """Return whether there is a result of a model in a test set."""
        return (model, test_set) in self._results

    def views(self, test_set: str) -> list[str]:
        """Return the views in which a test set was recognized, least noise first."""
        views = dict.fromkeys(
            view for (_, name), results in self._results.items() if name == test_set for view in results[0].words
        )
        return sorted(views, key=snr_db, reverse=True)

    def rate(self, model: str, test_set: str, view: str, *, unit: str = "words") -> Estimate:
        """Compute the error rate of a model, mean over seeds, with a 95% interval over clusters of words and seeds."""
        results = self.seeds(model, test_set)
        clusters = results[0].clusters_M
        if unit == "characters":
            clusters = clusters_of_characters(clusters, results[0].references)
        return bootstrap_runs(np.stack([getattr(result, unit)[view] for result in results]), clusters)

    def mean(self, model: str, test_set: str, view: str) -> float:
        """Return the word error rate of a model, mean over seeds."""
        return float(np.mean([result.words[view].mean() for result in self.seeds(model, test_set)]))

    def rates(self, models: Iterable[str], test_set: str) -> dict[str, dict[str, Estimate]]:
        """Return model -> view -> word error rate, of the models that have results in a test set."""
        return {
            model: {view: self.rate(model, test_set, view) for view in self.views(test_set)}
            for model in models
            if self.has(model, test_set)
        }

    def difference(self, model: str, base: str, test_set: str, view: str) -> Estimate:
        """Compute how much higher the word error rate of a model is than another's; seeds that both have are paired."""
        base_errors = {result.seed: result.words[view] for result in self.seeds(base, test_set)}
        results = [result for result in self.seeds(model, test_set) if result.seed in base_errors]
        if not results:
            raise DataError(f"expected {model} and {base} of the same seeds, got none in set {test_set}")
        gaps = [result.words[view] - base_errors[result.seed] for result in results]
        return bootstrap_runs(np.stack(gaps), results[0].clusters_M)


def format_rate(rate: Estimate) -> str:
    """Return an error rate in percent with its 95% interval, such as `12.3 [10.1, 14.5]`."""
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def format_difference(difference: Estimate) -> str:
    """Return a difference of error rates in points with its 95% interval, such as `-2.1 [-3.0, -1.2]`."""
    return f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def rate_table(results: Results, models: Iterable[str], test_set: str, *, unit: str = "words") -> Table:
    """Return error rates in percent with intervals: one row per model, one column per level of noise."""
    views = results.views(test_set)
    rows = [
        [model, *(format_rate(results.rate(model, test_set, view, unit=unit)) for view in views)]
        for model in models
        if results.has(model, test_set)
    ]
    return [{"words": "WER in %", "characters": "CER in %"}[unit], *map(level_name, views)], rows


def seed_table(results: Results, models: Iterable[str], test_set: str) -> Table:
    """Return the word error rates of each seed in percent: `1.1 / 0.9 / 1.4`."""
    views = results.views(test_set)
    rows = []
    for model in models:
        if results.has(model, test_set):
            seeds = results.seeds(model, test_set)
            cells = [" / ".join(f"{100 * result.words[view].mean():.1f}" for result in seeds) for view in views]
            rows.append([model, ", ".join(str(result.seed) for result in seeds), *cells])
    return ["WER in %", "seeds", *map(level_name, views)], rows


def gain_table(results: Results, models: Iterable[str], singles: Sequence[str], test_set: str) -> Table:
    """Return how many points better models are than the better one of two single streams at each level, paired."""
    views = results.views(test_set)
    better = [min(singles, key=lambda model: results.mean(model, test_set, view)) for view in views]
    rows = []
    for model in models:
        if results.has(model, test_set):
            gaps = [
                results.difference(model, single, test_set, view) for single, view in zip(better, views, strict=True)
            ]
            rows.append([model, *map(format_difference, gaps)])
    return ["points above the better stream", *map(level_name, views)], rows


def crossing_db(results: Results, audio: str, video: str, test_set: str) -> float | None:
    """Return the signal-to-noise ratio below which a model on lips has fewer errors than one on sound.

    It is interpolated between two levels; None if the curves do not cross between levels with noise.
    """
    views = [view for view in results.views(test_set) if np.isfinite(snr_db(view))]
    levels = [snr_db(view) for view in views]
    gaps = [results.mean(audio, test_set, view) - results.mean(video, test_set, view) for view in views]
    for place in range(len(views) - 1):
        if gaps[place] <= 0 < gaps[place + 1]:
            fraction = gaps[place] / (gaps[place] - gaps[place + 1])
            return levels[place] + fraction * (levels[place + 1] - levels[place])
    return None
