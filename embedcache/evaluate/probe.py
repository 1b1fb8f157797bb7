"""Probes: how well classifiers on a frozen feature predict a label, and few-shot curves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.errors import SettingError
from embedcache.evaluate.classifiers import Classifier, Examples, Fit, load_method
from embedcache.evaluate.labeled import LabeledFeature, name_some, read_labeled
from embedcache.evaluate.settings import ProbeSettings
from embedcache.metrics.classification import class_means, ranks_of
from embedcache.metrics.intervals import Estimate, bootstrap_class_mean, bootstrap_mean, bootstrap_runs
from embedcache.progress import NullProgress, Progress
from embedcache.store.cache import Cache

_TOP = 5
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy of one method on the test items.

    Args:
        method: name of the method.
        accuracy: top-1 accuracy, with a 95% interval from resampling the samples.
        top5: top-5 accuracy; None for five classes or fewer.
        mean_per_class: mean of `recalls` over the classes with test items, with its interval.
        recalls: (C,) float64 recall of each class; NaN for a class without test items.
        chosen: hyperparameters chosen on validation.
    """

    method: str
    accuracy: Estimate
    top5: float | None
    mean_per_class: Estimate
    recalls: Array
    chosen: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Accuracy of one method on the test items from a few training items per class.

    Args:
        method: name of the method.
        shots: training items per class.
        accuracy: mean over draws, with a 95% interval from resampling both draws and samples.
    """

    method: str
    shots: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Control:
    """Accuracy of one method on the test items after fitting on shuffled labels.

    Items of a class are close to each other, so a classifier gives most of a class one label, and a single shuffle may
    be far from chance, above or below, without a leak. The interval is therefore over shuffles, too.

    Args:
        method: name of the method.
        accuracy: mean over shuffles, with a 95% interval from resampling both shuffles and samples.
        by_shuffle: accuracy of each shuffle.
    """

    method: str
    accuracy: Estimate
    by_shuffle: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Probes of one feature.

    Args:
        labeled: the labeled items.
        settings: settings of the probes.
        scores: accuracy of each method.
        controls: accuracy of each method after fitting on shuffled labels, if asked for.
        few_shots: accuracy of each method and number of shots.
        majority: accuracy of predicting the most frequent class of training and validation.
    """

    labeled: LabeledFeature
    settings: ProbeSettings
    scores: Sequence[Score]
    controls: Sequence[Control]
    few_shots: Sequence[FewShot]
    majority: float

    @property
    def uniform(self) -> float:
        """Accuracy of predicting classes at random."""
        return 1 / len(self.labeled.names)

    def line(self) -> str:
        """Summarize what was measured in one line."""
        data, counts = self.labeled, self.counts
        pooled = " (mean of its tokens)" if data.feature.has_tokens else ""
        rest = f"; {data.num_left_out:,} items in no part or failed" if data.num_left_out else ""
        rest += f"; {data.num_unlabeled:,} without a label left out" if data.num_unlabeled else ""
        return (
            f"{data.feature.name}{pooled}: {len(data.names):,} classes; {counts['train']:,} train, "
            f"{counts['val']:,} val, {counts['test']:,} test {data.feature.modality}s; {data.split_rule}{rest}"
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of items of each part."""
        return {part: len(self.labeled.rows(part)) for part in ("train", "val", "test")}

    def warnings(self) -> list[str]:
        """Return one line for each reason to doubt the figures."""
        return [*_overlap_warning(self.labeled), *_class_warning(self.labeled), *map(_fit_warning, self._doubtful())]

    def _doubtful(self) -> list[Score]:
        return [s for s in self.scores if s.chosen.get("at_the_edge") or not s.chosen.get("converged", True)]


def evaluate_probe(
    cache_path: Path | str, settings: ProbeSettings | None = None, *, progress: Progress | None = None
) -> ProbeReport:
    """Fit classifiers on the training items of a feature, and measure them on its test items.

    A method chooses its hyperparameters on validation and is then fitted on training and validation together. Few-shot
    classifiers have fixed hyperparameters, as choosing them takes more labels. Memory: the vectors in float32, and
    about three copies of the training part.

    Args:
        cache_path: the cache.
        settings: feature, labels and methods.
        progress: progress in fits.

    Raises:
        SettingError: more shots than a class has training items.
        UnknownNameError: there is no such feature, column or method.
        UnfinishedError: the feature has missing chunks.
        DataError: labels or parts are not usable.
        MissingExtraError: logistic regression, and scikit-learn is not installed.
    """
    settings, progress = settings or ProbeSettings(), progress or NullProgress()
    methods = {name: load_method(name) for name in dict.fromkeys(settings.classifiers)}
    data = read_labeled(Cache(cache_path), settings)
    _check_shots(data, settings)
    num_fits = 1 + (settings.control + len(settings.shots)) * settings.draws
    progress.start("probing", len(methods) * num_fits, "fits")
    scores = [_score(name, fit, data, progress) for name, fit in methods.items()]
    controls = [_control(name, fit, data, settings, progress) for name, fit in methods.items() if settings.control]
    few_shots = [
        _few_shot(name, fit, data, shots, settings, progress)
        for name, fit in methods.items()
        for shots in settings.shots
    ]
    progress.finish()
    return ProbeReport(
        labeled=data,
        settings=settings,
        scores=scores,
        controls=controls,
        few_shots=few_shots,
        majority=_majority_accuracy(data),
    )


def _ranks(fitted: Classifier, test: Examples) -> Ints:
    """Compute the (Q,) rank of each item's class by its score. Memory: the scores of 8,192 items."""
    found = [
        ranks_of(fitted.scores(test.vectors[block]), test.labels[block]) for block in blocks(len(test.labels), _BLOCK)
    ]
    return np.concatenate(found)


def _score(name: str, fit: Fit, data: LabeledFeature, progress: Progress) -> Score:
    fitted = _fit(fit, data, data.examples.labels)
    rows = data.rows("test")
    test, clusters = data.examples.take(rows), data.items.samples[rows]
    ranks_Q = _ranks(fitted, test)
    progress.advance(1)
    return Score(
        method=name,
        accuracy=bootstrap_mean(ranks_Q == 1, clusters),
        top5=float(np.mean(ranks_Q <= _TOP)) if len(data.names) > _TOP else None,
        mean_per_class=bootstrap_class_mean(ranks_Q == 1, test.labels, clusters),
        recalls=class_means(ranks_Q == 1, test.labels, len(data.names)),
        chosen=fitted.chosen,
    )


def _control(name: str, fit: Fit, data: LabeledFeature, settings: ProbeSettings, progress: Progress) -> Control:
    def fit_shuffled(draw: int) -> Classifier:
        return _fit(fit, data, shuffle_labels(data, seed=(settings.seed, draw)))

    is_right_RQ = _are_right(fit_shuffled, data, settings, progress)
    accuracy = bootstrap_runs(is_right_RQ, data.items.samples[data.rows("test")])
    return Control(method=name, accuracy=accuracy, by_shuffle=is_right_RQ.mean(axis=1).tolist())


def _few_shot(
    name: str, fit: Fit, data: LabeledFeature, shots: int, settings: ProbeSettings, progress: Progress
) -> FewShot:
    def fit_drawn(draw: int) -> Classifier:
        drawn = draw_shots(data.examples.labels, data.rows("train"), shots, seed=(settings.seed, draw))
        return fit(data.examples.take(drawn), None, len(data.names))

    is_right_RQ = _are_right(fit_drawn, data, settings, progress)
    accuracy = bootstrap_runs(is_right_RQ, data.items.samples[data.rows("test")])
    return FewShot(method=name, shots=shots, accuracy=accuracy)


def _are_right(
    fit_draw: Callable[[int], Classifier], data: LabeledFeature, settings: ProbeSettings, progress: Progress
) -> Bools:
    """Return for each draw and test item whether the predicted class is right: (R, Q)."""
    test = data.examples.take(data.rows("test"))
    is_right_RQ = np.empty((settings.draws, len(test.labels)), bool)
    for draw in range(settings.draws):
        is_right_RQ[draw] = _ranks(fit_draw(draw), test) == 1
        progress.advance(1)
    return is_right_RQ


def _fit(fit: Fit, data: LabeledFeature, labels_M: Ints) -> Classifier:
    """Fit on the training and validation items with the given labels."""
    examples = Examples(vectors=data.examples.vectors, labels=labels_M)
    return fit(examples.take(data.rows("train")), examples.take(data.rows("val")), len(data.names))


def shuffle_labels(data: LabeledFeature, *, seed: Sequence[int]) -> Ints:
    """Return the (M,) labels, with those of training and validation in random order."""
    labels_M = data.examples.labels.copy()
    shuffled = np.flatnonzero(data.parts != "test")
    labels_M[shuffled] = np.random.default_rng(seed).permutation(labels_M[shuffled])
    return labels_M


def draw_shots(labels_M: Ints, rows: Ints, shots: int, *, seed: Sequence[int]) -> Ints:
    """Draw rows of each class, ascending by class; with one seed, fewer shots are a subset of more.

    Args:
        labels_M: (M,) int64 class of each item.
        rows: rows to draw from.
        shots: rows per class; every class among the rows has at least as many.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(rows)
    order = np.argsort(labels_M[shuffled], kind="stable")
    ordered = shuffled[order]
    _, starts = np.unique(labels_M[ordered], return_index=True)
    drawn: Ints = ordered[(starts[:, None] + np.arange(shots)).ravel()]
    return drawn


def _check_shots(data: LabeledFeature, settings: ProbeSettings) -> None:
    classes, counts = np.unique(data.examples.labels[data.rows("train")], return_counts=True)
    if max(settings.shots, default=0) > counts.min():
        least = data.names[classes[counts.argmin()]]
        raise SettingError(
            f"shots: expected at most {counts.min():,}, the training items of class {least!r}, got "
            f"{max(settings.shots):,}"
        )


def _majority_accuracy(data: LabeledFeature) -> float:
    is_test = data.parts == "test"
    most = np.bincount(data.examples.labels[~is_test]).argmax()
    return float(np.mean(data.examples.labels[is_test] == most))


def _overlap_warning(data: LabeledFeature) -> list[str]:
    overlap = data.overlap()
    line = f"WARNING: {overlap:,} test {data.feature.modality}s are copies of training or validation items"
    return [line] if overlap else []


def _class_warning(data: LabeledFeature) -> list[str]:
    is_test = data.parts == "test"
    unseen = np.setdiff1d(data.examples.labels[is_test], data.examples.labels[~is_test])
    names = name_some([data.names[number] for number in unseen])
    return [f"WARNING: {len(unseen):,} classes have test items and no training items: {names}"] if len(unseen) else []


def _fit_warning(score: Score) -> str:
    if not score.chosen.get("converged", True):
        return f"WARNING: {score.method} did not converge in {score.chosen['iterations']:,} iterations"
    return f"WARNING: the regularization chosen for {score.method} is at the edge of the grid"
