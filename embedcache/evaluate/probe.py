"""How much a frozen feature knows of a label: neighbors and linear classifiers fitted on it, and few-shot curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Ints, blocks
from embedcache.errors import SettingError
from embedcache.evaluate.classifiers import METHODS, Examples, Fit, Fitted
from embedcache.evaluate.labeled import HeldOut, Labeled, name_some, read_labeled
from embedcache.metrics.classification import class_means, ranks_of
from embedcache.metrics.intervals import Estimate, bootstrap_class_mean, bootstrap_mean, bootstrap_runs
from embedcache.progress import NullProgress, Progress
from embedcache.store.cache import Cache

_TOP = 5
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What is fitted, on which labels.

    Args:
        methods: `knn`, `logistic`, `ridge`, or `module:attribute` paths of your own; at least one.
        label: the column that holds the labels.
        part: which part of the source's column `split` is held out.
        shots: numbers of training items a class, for a few-shot curve.
        num_draws: how many drawings of those, and how many shuffles of the control.
        has_control: fit on shuffled labels, too: the control that must end at chance, on average of several shuffles.
        seed: of the cut, the drawings and the shuffling.
    """

    methods: tuple[str, ...] = ("knn", "logistic", "ridge")
    label: str = "label"
    part: HeldOut = "test"
    shots: tuple[int, ...] = ()
    num_draws: int = 5
    has_control: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise SettingError(f"no method to probe with; name one of {', '.join(METHODS.paths)}")
        if any(shots < 1 for shots in self.shots):
            raise SettingError(f"shots are {', '.join(map(str, self.shots))}; each must be at least 1")
        if self.num_draws < 1:
            raise SettingError(f"{self.num_draws} drawings of a few shots; take at least 1")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed is {self.seed}; it must be at least 0 and below 2^32")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one method reached on the test items.

    Args:
        method: its name.
        accuracy: share whose best class is right, with a 95 % interval from resampling the samples.
        top5: share whose class is among the best five; None where there are no more than five.
        mean_per_class: mean of `recalls` over the classes that have test items, with its interval.
        recalls: (C,) float64, share of each class's test items that are right; NaN where it has none.
        chosen: what was chosen on validation.
    """

    method: str
    accuracy: Estimate
    top5: float | None
    mean_per_class: Estimate
    recalls: Array
    chosen: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """What one method reached on the test items from a few training items a class.

    Args:
        method: its name.
        shots: how many.
        accuracy: mean over drawings, with a 95 % interval from resampling both drawings and samples.
    """

    method: str
    shots: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Control:
    """What one method reached on the test items after it was fitted on shuffled labels.

    Items of a class lie together, so a classifier sends most of a class to one label, and one shuffle may end far
    from chance, to either side, without a leak. The interval is therefore over shuffles, too.

    Args:
        method: its name.
        accuracy: mean over shuffles, with a 95 % interval from resampling both shuffles and samples.
        by_shuffle: the accuracy after each.
    """

    method: str
    accuracy: Estimate
    by_shuffle: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """All that was measured on one feature.

    Args:
        labeled: the items.
        settings: what was asked for.
        scores: of each method.
        controls: of each method, fitted on shuffled labels; none where not asked for.
        few_shots: of each method and number of shots.
        majority: share of the test items that are of the class most frequent in training and validation.
    """

    labeled: Labeled
    settings: ProbeSettings
    scores: Sequence[Score]
    controls: Sequence[Control]
    few_shots: Sequence[FewShot]
    majority: float

    @property
    def uniform(self) -> float:
        """What guessing one of the classes at random reaches."""
        return 1 / len(self.labeled.names)

    def line(self) -> str:
        """Say what was measured, in one line."""
        data, counts = self.labeled, self.counts
        pooled = " (mean of its tokens)" if data.side.has_tokens else ""
        left = f"; {data.num_left_out:,} items in no part or failed" if data.num_left_out else ""
        left += f"; {data.num_unlabeled:,} without a label left out" if data.num_unlabeled else ""
        return (
            f"{data.side.name}{pooled}: {len(data.names):,} classes; {counts['train']:,} train, {counts['val']:,} val, "
            f"{counts['test']:,} test {data.side.modality}s; {data.cut}{left}"
        )

    @property
    def counts(self) -> dict[str, int]:
        """Items of each part."""
        return {part: len(self.labeled.rows(part)) for part in ("train", "val", "test")}

    def warnings(self) -> list[str]:
        """Say what makes the figures doubtful."""
        return [*_overlap_warning(self.labeled), *_class_warning(self.labeled), *map(_fit_warning, self._doubtful())]

    def _doubtful(self) -> list[Score]:
        return [s for s in self.scores if s.chosen.get("at_the_edge") or not s.chosen.get("converged", True)]


def evaluate_probe(
    cache_path: Path | str,
    *,
    image: str | None = None,
    text: str | None = None,
    settings: ProbeSettings | None = None,
    progress: Progress | None = None,
) -> ProbeReport:
    """Fit classifiers on a feature's training items, and measure them on its test items.

    What a method chooses, it chooses on validation, and is then fitted on training and validation together; test is
    looked at once. A few shots are fitted at a fixed strength, as choosing one takes more labels. Memory: the vectors
    in float32, and some three copies of the training part.

    Args:
        cache_path: the cache.
        image: the feature, where it is of images; as of `Cache.feature`.
        text: where it is of texts. One of both is given.
        settings: what is fitted.
        progress: is told of each fit.

    Raises:
        SettingError: not one feature, or more shots than a class has training items.
        UnknownNameError: there is no such feature, column or method.
        UnfinishedError: the feature has uncommitted chunks.
        DataError: the labels or parts do not allow it.
        MissingExtraError: logistic regression, and scikit-learn is not installed.
    """
    settings, progress = settings or ProbeSettings(), progress or NullProgress()
    if (image is None) == (text is None):
        raise SettingError("feature: expected the name of one feature, as encoder/feature, got none")
    methods = {name: METHODS.load(name) for name in dict.fromkeys(settings.methods)}
    modality = "text" if image is None else "image"
    data = read_labeled(
        Cache(cache_path), modality, image or text, label=settings.label, part=settings.part, seed=settings.seed
    )
    _require_shots(data, settings)
    num_fits = 1 + (settings.has_control + len(settings.shots)) * settings.num_draws
    progress.start("probing", len(methods) * num_fits, "fits")
    report = ProbeReport(
        labeled=data,
        settings=settings,
        scores=[_score(name, fit, data, progress) for name, fit in methods.items()],
        controls=[
            _control(name, fit, data, settings, progress) for name, fit in methods.items() if settings.has_control
        ],
        few_shots=[
            _few_shot(name, fit, data, shots, settings, progress)
            for name, fit in methods.items()
            for shots in settings.shots
        ],
        majority=_majority(data),
    )
    progress.finish()
    return report


def _ranks(fitted: Fitted, test: Examples) -> Ints:
    """Rank each item's class among all by its score: (Q,) int64. Memory: the scores of 8,192 items."""
    found = [
        ranks_of(fitted.scores(test.vectors[block]), test.labels[block]) for block in blocks(len(test.labels), _BLOCK)
    ]
    return np.concatenate(found)


def _score(name: str, fit: Fit, data: Labeled, progress: Progress) -> Score:
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


def _control(name: str, fit: Fit, data: Labeled, settings: ProbeSettings, progress: Progress) -> Control:
    rows = data.rows("test")
    test = data.examples.take(rows)
    is_right_RQ = np.empty((settings.num_draws, len(rows)), bool)
    for draw in range(settings.num_draws):
        labels_M = shuffle_labels(data, seed=(settings.seed, draw))
        is_right_RQ[draw] = _ranks(_fit(fit, data, labels_M), test) == 1
        progress.advance(1)
    return Control(
        method=name,
        accuracy=bootstrap_runs(is_right_RQ, data.items.samples[rows]),
        by_shuffle=is_right_RQ.mean(axis=1).tolist(),
    )


def _fit(fit: Fit, data: Labeled, labels_M: Ints) -> Fitted:
    """Fit on the training and validation items with these labels."""
    taught = Examples(vectors=data.examples.vectors, labels=labels_M)
    return fit(taught.take(data.rows("train")), taught.take(data.rows("val")), len(data.names))


def shuffle_labels(data: Labeled, *, seed: Sequence[int]) -> Ints:
    """Give the (M,) labels with those of training and validation in random order; test keeps its own."""
    labels_M = data.examples.labels.copy()
    taught = np.flatnonzero(data.parts != "test")
    labels_M[taught] = np.random.default_rng(seed).permutation(labels_M[taught])
    return labels_M


def _few_shot(name: str, fit: Fit, data: Labeled, shots: int, settings: ProbeSettings, progress: Progress) -> FewShot:
    rows = data.rows("test")
    test = data.examples.take(rows)
    is_right_RQ = np.empty((settings.num_draws, len(rows)), bool)
    for draw in range(settings.num_draws):
        drawn = draw_shots(data.examples.labels, data.rows("train"), shots, seed=(settings.seed, draw))
        is_right_RQ[draw] = _ranks(fit(data.examples.take(drawn), None, len(data.names)), test) == 1
        progress.advance(1)
    return FewShot(method=name, shots=shots, accuracy=bootstrap_runs(is_right_RQ, data.items.samples[rows]))


def draw_shots(labels_M: Ints, rows: Ints, shots: int, *, seed: Sequence[int]) -> Ints:
    """Draw so many rows of each class, ascending by class; fewer shots of one seed are among its more.

    Args:
        labels_M: (M,) int64, the class of each item.
        rows: the rows to draw from.
        shots: how many a class; each class that is there has as many.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(rows)
    order = np.argsort(labels_M[shuffled], kind="stable")
    ordered = shuffled[order]
    _, starts = np.unique(labels_M[ordered], return_index=True)
    drawn: Ints = ordered[(starts[:, None] + np.arange(shots)).ravel()]
    return drawn


def _require_shots(data: Labeled, settings: ProbeSettings) -> None:
    classes, counts = np.unique(data.examples.labels[data.rows("train")], return_counts=True)
    if max(settings.shots, default=0) > counts.min():
        least = data.names[classes[counts.argmin()]]
        raise SettingError(
            f"{max(settings.shots)} shots are more than class {least!r} has in training, {counts.min():,}; "
            f"ask for at most {counts.min():,}"
        )


def _majority(data: Labeled) -> float:
    is_test = data.parts == "test"
    most = np.bincount(data.examples.labels[~is_test]).argmax()
    return float(np.mean(data.examples.labels[is_test] == most))


def _overlap_warning(data: Labeled) -> list[str]:
    overlap = data.overlap()
    what = "picture is" if data.side.modality == "image" else "text is"
    said = f"WARNING: {overlap:,} test items, whose {what} exactly one of training or validation, raise the figures"
    return [said] if overlap else []


def _class_warning(data: Labeled) -> list[str]:
    is_test = data.parts == "test"
    unseen = np.setdiff1d(data.examples.labels[is_test], data.examples.labels[~is_test])
    names = name_some([data.names[number] for number in unseen])
    return [f"WARNING: {len(unseen):,} classes have test items and no training items: {names}"] if len(unseen) else []


def _fit_warning(score: Score) -> str:
    if not score.chosen.get("converged", True):
        return f"WARNING: {score.method} stopped after {score.chosen['iterations']:,} steps, before it converged"
    return f"WARNING: the strength of {score.method} that validation chose is the first or last of those tried"
