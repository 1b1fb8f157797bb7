"""Probes: how well classifiers on a frozen feature predict a label, and few-shot curves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from embedcache.arrays import Array, Ints, blocks
from embedcache.devices import products_on
from embedcache.errors import first_few, pluralize
from embedcache.evaluate.classifiers import Classifier, Examples, Fit, load_method
from embedcache.evaluate.labeled import LabeledFeature, read_labeled
from embedcache.evaluate.settings import ProbeSettings
from embedcache.files import AnyPath
from embedcache.metrics.intervals import Estimate, bootstrap_class_mean, bootstrap_mean, bootstrap_runs
from embedcache.metrics.ranking import class_means, rank_labels
from embedcache.modalities import noun, one_noun
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import ProbeOptions

_TOP = 5
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy of one method on the test items.

    Args:
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
    """Mean accuracy from a few training items per class, with an interval from resampling both draws and samples."""

    method: str
    shots: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Control:
    """Accuracy of one method on the test items after fitting on shuffled labels.

    Items of a class are close to each other, so a classifier gives most of a class one label, and a single shuffle may
    be far from chance, above or below, without a leak. The interval is therefore over shuffles, too.
    """

    method: str
    accuracy: Estimate
    by_shuffle: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Probes of one feature; `majority` is the accuracy of predicting the most frequent class."""

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
        rest = f"; {pluralize(data.num_left_out, 'item')} in no part or failed" if data.num_left_out else ""
        rest += f"; {data.num_unlabeled:,} without a label left out" if data.num_unlabeled else ""
        return (
            f"{data.feature.name}{pooled}: {len(data.names):,} classes; {counts['train']:,} train, "
            f"{counts['val']:,} val, {counts['test']:,} test {noun(data.feature.modality)}; {data.split_rule}{rest}"
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of items of each part."""
        return {part: len(self.labeled.rows(part)) for part in ("train", "val", "test")}

    def warnings(self) -> list[str]:
        """Return one line for each reason to doubt the results."""
        data, is_test, lines = self.labeled, self.labeled.parts == "test", []
        if overlap := data.overlap():
            one, many = one_noun(data.feature.modality), noun(data.feature.modality)
            copies = pluralize(overlap, f"test {one} is a copy", f"test {many} are copies")
            lines.append(f"{copies} of training or validation items")
        unseen = np.setdiff1d(data.examples.labels[is_test], data.examples.labels[~is_test])
        if len(unseen):
            names = first_few(unseen.tolist(), 5, show=lambda number: repr(data.names[number]))
            lines.append(
                f"{pluralize(len(unseen), 'class has', 'classes have')} test items and no training items: {names}"
            )
        for score in self.scores:
            if not score.chosen.get("converged", True):
                lines.append(f"{score.method} did not converge in {score.chosen['iterations']:,} iterations")
            elif score.chosen.get("at_the_edge"):
                lines.append(f"the regularization chosen for {score.method} is at the edge of the grid")
        return [f"WARNING: {line}" for line in lines]


def evaluate_probe(
    cache: AnyPath,
    settings: ProbeSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["ProbeOptions"],
) -> ProbeReport:
    """Fit classifiers on the training items of a feature, and measure them on its test items.

    A method chooses its hyperparameters on validation and is then fitted on training and validation together. Few-shot
    classifiers have fixed hyperparameters, as choosing them needs more labels. Memory: the vectors in float32, and
    about three copies of the training part.

    Raises:
        SettingError: more shots than a class has training items.
        UnknownNameError: there is no such feature, column or method.
        UnfinishedError: the feature has missing chunks.
        DataError: labels or parts are not usable.
        MissingExtraError: logistic regression, and scikit-learn is not installed.
    """
    settings, progress = merge_settings(ProbeSettings, settings, options), to_progress(progress)
    methods = {name: load_method(name) for name in dict.fromkeys(settings.classifiers)}
    data = read_labeled(Cache(cache), settings, progress=progress)
    data = replace(data, examples=replace(data.examples, products=products_on(settings.device)))
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
    is_test = data.parts == "test"
    most_frequent = np.bincount(data.examples.labels[~is_test]).argmax()
    return ProbeReport(
        labeled=data,
        settings=settings,
        scores=scores,
        controls=controls,
        few_shots=few_shots,
        majority=float(np.mean(data.examples.labels[is_test] == most_frequent)),
    )


def _ranks(fitted: Classifier, test: Examples) -> Ints:
    """Compute the (Q,) rank of each item's class by its score. Memory: the scores of 8,192 items."""
    all_rows = blocks(len(test.labels), _BLOCK)
    return np.concatenate([rank_labels(fitted.scores(test.vectors[rows]), test.labels[rows]) for rows in all_rows])


def _score(name: str, fit: Fit, data: LabeledFeature, progress: Progress) -> Score:
    """Fit a method on all training items, and measure it on the test items; intervals are over their samples."""
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
    """Measure a method that is fitted on shuffled labels, which must stay at chance."""

    def fit_shuffled(draw: int) -> Classifier:
        return _fit(fit, data, shuffle_labels(data, seed=(settings.seed, draw)))

    accuracy, by_shuffle = _repeat(fit_shuffled, data, settings, progress)
    return Control(method=name, accuracy=accuracy, by_shuffle=by_shuffle)


def _few_shot(
    name: str, fit: Fit, data: LabeledFeature, shots: int, settings: ProbeSettings, progress: Progress
) -> FewShot:
    """Measure a method that is fitted on a few items per class, drawn several times."""

    def fit_drawn(draw: int) -> Classifier:
        rows = draw_shots(data.examples.labels, data.rows("train"), shots, seed=(settings.seed, draw))
        return fit(data.examples.take(rows), None, len(data.names))

    return FewShot(method=name, shots=shots, accuracy=_repeat(fit_drawn, data, settings, progress)[0])


def _repeat(
    fit_draw: Callable[[int], Classifier], data: LabeledFeature, settings: ProbeSettings, progress: Progress
) -> tuple[Estimate, list[float]]:
    """Compute the accuracy over draws, with an interval over draws and samples, and that of each draw."""
    rows = data.rows("test")
    test = data.examples.take(rows)
    is_right_RQ = np.empty((settings.draws, len(test.labels)), bool)
    for draw in range(settings.draws):
        is_right_RQ[draw] = _ranks(fit_draw(draw), test) == 1
        progress.advance(1)
    return bootstrap_runs(is_right_RQ, data.items.samples[rows]), is_right_RQ.mean(axis=1).tolist()


def _fit(fit: Fit, data: LabeledFeature, labels_M: Ints) -> Classifier:
    """Fit on the training and validation items with the given labels."""
    examples = replace(data.examples, labels=labels_M)
    return fit(examples.take(data.rows("train")), examples.take(data.rows("val")), len(data.names))


def shuffle_labels(data: LabeledFeature, *, seed: Sequence[int]) -> Ints:
    """Return the (M,) labels, with those of training and validation in random order."""
    labels_M = data.examples.labels.copy()
    shuffled = np.flatnonzero(data.parts != "test")
    labels_M[shuffled] = np.random.default_rng(seed).permutation(labels_M[shuffled])
    return labels_M


def draw_shots(labels_M: Ints, rows: Ints, shots: int, *, seed: Sequence[int]) -> Ints:
    """Draw some of the rows of each class, ascending by class; with one seed, fewer shots are a subset of more."""
    shuffled = np.random.default_rng(seed).permutation(rows)
    ordered = shuffled[np.argsort(labels_M[shuffled], kind="stable")]
    _, starts = np.unique(labels_M[ordered], return_index=True)
    shot_rows: Ints = ordered[(starts[:, None] + np.arange(shots)).ravel()]
    return shot_rows
