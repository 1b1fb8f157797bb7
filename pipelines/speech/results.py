"""Results of speech recognition on disk, tables over seeds, and what a fusion has to reach."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Ints
from embedcache.errors import DataError
from embedcache.evaluate.speech import SpeechReport
from embedcache.evaluate.utterances import clusters_of_characters
from embedcache.metrics.edits import (
    ErrorCounts,
    count_character_errors,
    estimate_error_difference,
    estimate_error_rate,
)
from embedcache.metrics.intervals import Estimate
from embedcache.provenance import construct
from embedcache.reports.base import Table
from embedcache.reports.speech import format_difference, format_rate
from embedcache.reports.speech_figures import parse_level, view_names
from pipelines.results import read_values, write_values

_POINT = 0.01
_COUNTS = ("errors_M", "lengths_N", "substitutions_N", "deletions_N", "insertions_N")


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
        words: view of the sound -> errors of the words.
        hypotheses: view of the sound -> what was recognized.
    """

    model: str
    test_set: str
    seed: int
    weights: str
    cluster_noun: str
    clusters_M: Ints
    references: Sequence[str]
    words: Mapping[str, ErrorCounts]
    hypotheses: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, report: SpeechReport, *, model: str, test_set: str, seed: int, weights: str) -> "Result":
        """Return the result that a report holds."""
        return cls(
            model=model,
            test_set=test_set,
            seed=seed,
            weights=weights,
            cluster_noun=report.clusters.noun,
            clusters_M=report.clusters.numbers_M,
            references=report.references,
            words={view: found.words for view, found in report.views.items()},
            hypotheses={view: found.hypotheses for view, found in report.views.items()},
        )

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        words = {
            view: {name: getattr(counts, name).tolist() for name in _COUNTS} for view, counts in self.words.items()
        }
        values = {**vars(self), "clusters_M": self.clusters_M.tolist(), "words": words}
        values.pop("characters", None)
        write_values(path, values)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a result that `write` wrote."""
        return construct(path, partial(cls._from_values, read_values(path)))

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "Result":
        words = {
            view: ErrorCounts(**{name: np.array(counts[name], np.int64) for name in _COUNTS})
            for view, counts in values["words"].items()
        }
        return cls(**{**values, "clusters_M": np.array(values["clusters_M"], np.int64), "words": words})

    @cached_property
    def characters(self) -> Mapping[str, ErrorCounts]:
        """View of the sound -> errors of the characters."""
        return {view: count_character_errors(self.references, found) for view, found in self.hypotheses.items()}


class Results:
    """Results of several models, test sets and seeds."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results: dict[tuple[str, str], list[Result]] = {}
        self._rates: dict[tuple[str, str, str, str], Estimate] = {}
        for result in sorted(results, key=lambda result: result.seed):
            self._results.setdefault((result.model, result.test_set), []).append(result)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Read all results in a folder and those below."""
        return cls(Result.read(path) for path in sorted(folder.rglob("*.json")))

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
            v for (_, of_set), found in self._results.items() if of_set == test_set for v in found[0].words
        )
        levels = {view: parse_level(view) for view in views}
        return sorted(views, key=lambda view: -np.inf if (level := levels[view]) is None else -level.snr_db)

    def rate(self, model: str, test_set: str, view: str, *, unit: str = "words") -> Estimate:
        """Compute the error rate of a model, mean over seeds, with a 95% interval over clusters of words and seeds."""
        key = model, test_set, view, unit
        if key not in self._rates:
            found = self.seeds(model, test_set)
            clusters = found[0].clusters_M
            if unit == "characters":
                clusters = clusters_of_characters(clusters, found[0].references)
            self._rates[key] = estimate_error_rate([getattr(result, unit)[view] for result in found], clusters)
        return self._rates[key]

    def mean(self, model: str, test_set: str, view: str) -> float:
        """Return the word error rate of a model, mean over seeds."""
        return float(np.mean([result.words[view].rate for result in self.seeds(model, test_set)]))

    def rates(self, models: Iterable[str], test_set: str) -> dict[str, dict[str, Estimate]]:
        """Return model -> view -> word error rate, of the models that have results in a test set."""
        return {
            model: {view: self.rate(model, test_set, view) for view in self.views(test_set)}
            for model in models
            if self.has(model, test_set)
        }

    def difference(self, model: str, base: str, test_set: str, view: str) -> Estimate:
        """Compute how much higher the word error rate of a model is than another's; seeds that both have are paired."""
        pairs = [(a, b) for a in self.seeds(model, test_set) for b in self.seeds(base, test_set) if a.seed == b.seed]
        if not pairs:
            raise DataError(f"expected {model} and {base} of the same seeds, got none in set {test_set}")
        counts = [[pair[side].words[view] for pair in pairs] for side in (0, 1)]
        return estimate_error_difference(counts[0], counts[1], pairs[0][0].clusters_M)


def rate_table(results: Results, models: Iterable[str], test_set: str, *, unit: str = "words") -> Table:
    """Return error rates in percent with intervals: one row per model, one column per level of noise."""
    views = results.views(test_set)
    rows = [
        [model, *(format_rate(results.rate(model, test_set, view, unit=unit)) for view in views)]
        for model in models
        if results.has(model, test_set)
    ]
    return [{"words": "WER in %", "characters": "CER in %"}[unit], *view_names(views).values()], rows


def seed_table(results: Results, models: Iterable[str], test_set: str) -> Table:
    """Return the word error rates of each seed in percent: `1.1 / 0.9 / 1.4`."""
    views = results.views(test_set)
    rows = []
    for model in models:
        if results.has(model, test_set):
            found = results.seeds(model, test_set)
            cells = [" / ".join(f"{100 * result.words[view].rate:.1f}" for result in found) for view in views]
            rows.append([model, ", ".join(str(result.seed) for result in found), *cells])
    return ["WER in %", "seeds", *view_names(views).values()], rows


def gain_table(results: Results, models: Iterable[str], singles: Sequence[str], test_set: str) -> Table:
    """Return how many points better models are than the better one of two single streams at each level, paired."""
    views = results.views(test_set)
    rows = []
    for model in models:
        if results.has(model, test_set):
            found = [
                results.difference(model, better(results, singles, test_set, view), test_set, view) for view in views
            ]
            rows.append([model, *(format_difference(gap) for gap in found)])
    return ["points above the better stream", *view_names(views).values()], rows


def better(results: Results, models: Sequence[str], test_set: str, view: str) -> str:
    """Return the model with the fewest errors."""
    return min(models, key=lambda model: results.mean(model, test_set, view))


def crossing_db(results: Results, audio: str, video: str, test_set: str) -> float | None:
    """Return the signal-to-noise ratio below which a model on lips has fewer errors than one on sound.

    It is interpolated between two levels; None if the curves do not cross between levels with noise.
    """
    views = [view for view in results.views(test_set) if (level := parse_level(view)) and np.isfinite(level.snr_db)]
    levels = [level.snr_db for view in views if (level := parse_level(view))]
    gaps = [results.mean(audio, test_set, view) - results.mean(video, test_set, view) for view in views]
    for place in range(len(views) - 1):
        if gaps[place] <= 0 < gaps[place + 1]:
            fraction = gaps[place] / (gaps[place] - gaps[place + 1])
            return levels[place] + fraction * (levels[place + 1] - levels[place])
    return None


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Models that requirements compare, by their names in the results; None where there is none.

    Args:
        fusion: the model that has to fulfill them.
        audio, video: models of one stream.
        deep_video: a model on lips with as many layers as the fusion.
        without_video, without_audio: a fusion with modality dropout, given one stream.
        shuffled: the fusion with lips of other utterances.
        greedy: the fusion with greedy decoders.
    """

    fusion: str
    audio: str
    video: str
    deep_video: str | None = None
    without_video: str | None = None
    without_audio: str | None = None
    shuffled: str | None = None
    greedy: tuple[str, ...] = ()


def requirement_table(results: Results, roles: Roles, *, known: Sequence[str], unlike: Sequence[str]) -> Table:
    """Return whether a fusion fulfills what is required of it, with its worst level: one row per requirement and set.

    Args:
        results: results of all models.
        roles: which models are compared.
        known: test sets whose speech and lips are made as those of the training.
        unlike: test sets with another synthesizer or real recordings.
    """
    requirements = [found for test_set in known for found in _check_known(results, roles, test_set)]
    requirements += [found for test_set in unlike for found in _check_unlike(results, roles, test_set)]
    rows = [[found.text, found.test_set, found.worst, "yes" if found.holds else "no"] for found in requirements]
    return [roles.fusion, "set", "worst level", "holds"], rows


class Requirement(NamedTuple):
    """A requirement of a model in a test set, the level of noise that fulfills it least, and whether it holds."""

    text: str
    test_set: str
    worst: str
    holds: bool


def _check_known(results: Results, roles: Roles, test_set: str) -> Iterator[Requirement]:
    """Check what is required in a test set that is made as the training is."""
    own = Comparison(results, roles.fusion, test_set)
    singles = [roles.audio, roles.deep_video or roles.video]
    yield own.at_most(singles, 1.0, "at most 1 point above the better stream")
    yield own.at_most(singles, -5.0, "5 points below the better stream at 10, 5, 0 dB", decibels=(10, 5, 0))
    yield own.below("1.5% without noise", 1.5, np.inf)
    yield own.below("31% at the lowest level", 31.0, None)
    for part, single, noun in (
        (roles.without_video, roles.audio, "sound"),
        (roles.without_audio, roles.video, "lips"),
    ):
        if part is not None and results.has(part, test_set):
            text = f"given {noun} alone, at most 3 points above {single}"
            yield Comparison(results, part, test_set).at_most([single], 3.0, text)
    if roles.shuffled is not None and results.has(roles.shuffled, test_set):
        yield Comparison(results, roles.shuffled, test_set).at_least(
            roles.audio, f"lips of other utterances: not below {roles.audio}"
        )
    for other in roles.greedy:
        if results.has(other, test_set):
            yield own.at_most([other], 0.0, f"at most {other}")


def _check_unlike(results: Results, roles: Roles, test_set: str) -> Iterator[Requirement]:
    """Check what is required in a test set that is unlike the training."""
    own = Comparison(results, roles.fusion, test_set)
    yield own.at_most(
        [roles.audio], 0.0, f"below {roles.audio} from 5 dB down", decibels=(5, 0, -5, -10), is_strict=True
    )
    yield own.at_most(
        [roles.audio], 1.0, f"at most 1 point above {roles.audio} without noise and at 10 dB", decibels=(np.inf, 10)
    )


@dataclass(frozen=True)
class Comparison:
    """A model in a test set, which is compared with others to check requirements."""

    results: Results
    model: str
    test_set: str

    def at_most(
        self,
        others: Sequence[str],
        points: float,
        text: str,
        *,
        decibels: Sequence[float] | None = None,
        is_strict: bool = False,
    ) -> Requirement:
        """Require an error rate of at most so many points above the better one of other models, at some levels."""
        gaps = {}
        for view in self._views(decibels):
            base = better(self.results, others, self.test_set, view)
            gaps[view] = self.results.difference(self.model, base, self.test_set, view)
        worst = max(gaps, key=lambda view: gaps[view].value)
        limit = points * _POINT
        holds = gaps[worst].value < limit if is_strict else gaps[worst].value <= limit + 1e-9
        return self._requirement(text, worst, format_difference(gaps[worst]), holds=holds)

    def at_least(self, other: str, text: str) -> Requirement:
        """Require that no error rate is below another model's, beyond the interval."""
        gaps = {view: self.results.difference(self.model, other, self.test_set, view) for view in self._views(None)}
        worst = min(gaps, key=lambda view: gaps[view].value)
        return self._requirement(
            text, worst, format_difference(gaps[worst]), holds=all(gap.high >= 0 for gap in gaps.values())
        )

    def below(self, text: str, percent: float, decibels: float | None) -> Requirement:
        """Require an error rate of at most so many percent at one level; None: at the last one."""
        view = self._views(None)[-1] if decibels is None else self._views([decibels])[0]
        rate = self.results.rate(self.model, self.test_set, view)
        return self._requirement(f"at most {text}", view, format_rate(rate), holds=100 * rate.value <= percent)

    def _views(self, decibels: Sequence[float] | None) -> list[str]:
        views = self.results.views(self.test_set)
        levels = {view: parse_level(view) for view in views}
        found = [
            v for v in views if decibels is None or ((level := levels[v]) is not None and level.snr_db in decibels)
        ]
        if not found:
            raise DataError(f"expected set {self.test_set} at one of the levels {decibels} dB, got {', '.join(views)}")
        return found

    def _requirement(self, text: str, view: str, value: str, *, holds: bool) -> Requirement:
        title = view_names(self.results.views(self.test_set))[view]
        return Requirement(text, self.test_set, f"{title}: {value}", holds)
