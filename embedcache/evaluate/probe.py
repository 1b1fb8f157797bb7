"""Measure how well classifiers on a frozen feature predict a label, also from a few examples per class."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Floats, Ints, blocks, number_values
from embedcache.dataset.inputs import InputFeature, open_input, to_mean_vectors
from embedcache.dataset.labels import Labels, has_label, read_labels
from embedcache.dataset.matches import ItemSet
from embedcache.dataset.pairs import Items, Pairs, read_items
from embedcache.dataset.selections import read_selection
from embedcache.dataset.settings import with_split_seed
from embedcache.dataset.splits import PARTS, column_parts, draw_groups, make_split
from embedcache.errors import DataError, SettingError, first_few, pluralize, summary
from embedcache.evaluate.classifiers import Classifier, Examples, Fit, load_method
from embedcache.evaluate.runs import Overlap, measure_overlap
from embedcache.evaluate.settings import ProbeSettings
from embedcache.files import AnyPath
from embedcache.metrics import (
    Estimate,
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_runs,
    class_means,
    rank_labels,
)
from embedcache.modalities import noun
from embedcache.processes import products_on
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.settings import merge_settings, replace_flat, to_flat
from embedcache.store.cache import Cache, Keys

if TYPE_CHECKING:
    from embedcache.options import ProbeOptions

_TOP = 5
_BLOCK = 8192
_SPLIT = "split"


@dataclass(frozen=True, kw_only=True)
class LabeledFeature:
    """The labeled items of one feature, in row order.

    Args:
        names: names of the classes.
        examples: (M, D) vectors, the mean of the tokens of an item, and (M,) classes.
        parts: (M,) `train`, `val` or `test`.
        groups: (M,) near-duplicate group of each item's sample. Groups are resampled for intervals.
        split_rule: description of how the parts were made.
        cosines: modality -> cosine above which items are near-duplicates.
        num_unlabeled: items without a label, left out.
        num_left_out: other items that failed or are in no part.
    """

    feature: InputFeature
    names: list[str]
    items: Items
    examples: Examples
    parts: Array
    groups: Ints
    split_rule: str
    cosines: Mapping[str, float]
    num_unlabeled: int
    num_left_out: int

    def rows(self, part: str) -> Ints:
        """Return the positions of the items of a part, ascending."""
        return np.flatnonzero(self.parts == part)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy of one method on the test items.

    Args:
        accuracy: top-1 accuracy, with a 95% interval from resampling near-duplicate groups.
        top5: top-5 accuracy, None for five classes or fewer.
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
    """Mean accuracy from a few training items per class, with an interval from resampling both draws and groups."""

    method: str
    shots: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Control:
    """Accuracy of one method on the test items after fitting on shuffled labels.

    Items of a class are close to each other, so a classifier gives most of a class one label. A single shuffle may
    therefore be far from chance, above or below, without a leak. So the interval also covers the variance of shuffles.
    """

    method: str
    accuracy: Estimate
    by_shuffle: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Probes of one feature. `majority` is the accuracy of predicting the most frequent class.

    Example:
        >>> report = embedcache.evaluate_probe("labeled", feature="open_toy/cls", classifier=("knn",))
        >>> report.counts
        {'train': 162, 'val': 18, 'test': 60}
        >>> report.scores[0].method, round(report.uniform, 3)
        ('knn', 0.167)
    """

    labeled: LabeledFeature
    settings: ProbeSettings
    overlap: Overlap | None
    scores: Sequence[Score]
    controls: Sequence[Control]
    few_shots: Sequence[FewShot]
    majority: float

    @property
    def uniform(self) -> float:
        """Accuracy of predicting classes at random."""
        return 1 / len(self.labeled.names)

    __repr__ = summary

    def lines(self) -> list[str]:
        """Summarize the measurement, with the accuracy of each method and of the most frequent class."""
        scores = ", ".join(f"{score.method} {score.accuracy}" for score in self.scores)
        return [self.line(), f"accuracy: {scores}; most frequent class {self.majority:.3f}"]

    def line(self) -> str:
        """Summarize the measurement in one line."""
        data = self.labeled
        counts = self.counts
        pooled = " (mean of its tokens)" if data.feature.has_tokens else ""
        reasons = "in no part or failed" if self.settings.selection is None else "not selected, in no part or failed"
        rest = f"; {pluralize(data.num_left_out, 'item')} {reasons}" if data.num_left_out else ""
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
        lines = []
        if self.overlap is not None and self.overlap.warning:
            lines.append(self.overlap.line())

        # A class that no training item has cannot be predicted.
        data = self.labeled
        is_test = data.parts == "test"
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
        return lines


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

    Example:
        >>> report = embedcache.evaluate_probe("labeled", feature="open_toy/cls", classifier=("knn",))
        >>> report.counts["test"], report.scores[0].accuracy.value > report.majority
        (60, True)
    """
    settings = merge_settings(ProbeSettings, settings, {})
    settings = replace_flat(settings, with_split_seed(options, settings))
    progress = to_progress(progress)
    # Methods are loaded first, as an unknown name or a missing package must not cost the reading of the vectors.
    methods = {name: load_method(name) for name in dict.fromkeys(settings.classifiers)}
    data = read_labeled(Cache(cache), settings, progress=progress)
    data = replace(data, examples=replace(data.examples, products=products_on(settings.device)))

    # The control and each number of shots are fitted once per draw.
    num_fits = 1 + (settings.control + len(settings.shots)) * settings.draws
    progress.start("probing", len(methods) * num_fits, "fits")
    scores = []
    controls = []
    few_shots = []
    for name, fit in methods.items():
        scores.append(_score(name, fit, data, progress))
        if settings.control:
            controls.append(_control(name, fit, data, settings, progress))
        for shots in settings.shots:
            few_shots.append(_few_shot(name, fit, data, shots, settings, progress))
    progress.finish()

    # Predicting the most frequent class is the level that a probe must exceed.
    is_test = data.parts == "test"
    most_frequent = np.bincount(data.examples.labels[~is_test]).argmax()
    return ProbeReport(
        labeled=data,
        settings=settings,
        overlap=_find_overlap(data, progress) if settings.check_overlap else None,
        scores=scores,
        controls=controls,
        few_shots=few_shots,
        majority=float(np.mean(data.examples.labels[is_test] == most_frequent)),
    )


def _find_overlap(data: LabeledFeature, progress: Progress) -> Overlap:
    """Compare the test items with the items of training and validation, by the limits of the split."""
    is_test = data.parts == "test"
    modality = data.feature.modality
    tested = {modality: ItemSet(data.feature, data.items.where(is_test))}
    trained = {modality: ItemSet(data.feature, data.items.where(~is_test))}
    return measure_overlap(tested, [trained], data.cosines, progress=progress)


def _ranks(fitted: Classifier, test: Examples) -> Ints:
    """Compute the (Q,) rank of each item's class by its score. Memory: the scores of 8,192 items."""
    ranks_Q = np.empty(len(test.labels), np.int64)
    for block in blocks(len(test.labels), _BLOCK):
        ranks_Q[block] = rank_labels(fitted.scores(test.vectors[block]), test.labels[block])
    return ranks_Q


def _score(name: str, fit: Fit, data: LabeledFeature, progress: Progress) -> Score:
    """Fit a method on all training items, and measure it on the test items. Intervals are over groups."""
    fitted = _fit(fit, data, data.examples.labels)
    rows = data.rows("test")
    test = data.examples.take(rows)
    clusters = data.groups[rows]
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
    """Compute the accuracy over draws, with an interval over draws and groups, and the accuracy of each draw."""
    # All draws are measured on the same items, so that their interval can be over draws and groups.
    rows = data.rows("test")
    test = data.examples.take(rows)
    is_right_RQ = np.empty((settings.draws, len(test.labels)), bool)
    for draw in range(settings.draws):
        is_right_RQ[draw] = _ranks(fit_draw(draw), test) == 1
        progress.advance(1)
    return bootstrap_runs(is_right_RQ, data.groups[rows]), is_right_RQ.mean(axis=1).tolist()


def _fit(fit: Fit, data: LabeledFeature, labels_M: Ints) -> Classifier:
    """Fit on the training and validation items with the given labels."""
    examples = replace(data.examples, labels=labels_M)
    return fit(examples.take(data.rows("train")), examples.take(data.rows("val")), len(data.names))


def shuffle_labels(data: LabeledFeature, *, seed: Sequence[int]) -> Ints:
    """Return the (M,) labels. Labels of training and validation items are in random order."""
    labels_M = data.examples.labels.copy()
    shuffled = np.flatnonzero(data.parts != "test")
    labels_M[shuffled] = np.random.default_rng(seed).permutation(labels_M[shuffled])
    return labels_M


def draw_shots(labels_M: Ints, rows: Ints, shots: int, *, seed: Sequence[int]) -> Ints:
    """Draw some rows of each class, ascending by class. With the same seed, fewer shots are a subset of more shots."""
    # Each class keeps the shuffled order, so that more shots only add rows.
    shuffled = np.random.default_rng(seed).permutation(rows)
    ordered = shuffled[np.argsort(labels_M[shuffled], kind="stable")]
    _, starts = np.unique(labels_M[ordered], return_index=True)
    shot_rows: Ints = ordered[(starts[:, None] + np.arange(shots)).ravel()]
    return shot_rows


def read_labeled(cache: Cache, settings: ProbeSettings, *, progress: Progress | None = None) -> LabeledFeature:
    """Read the vectors, labels and parts of a feature.

    Parts come from the column `split` if the cache has one and no split was given, and otherwise from the split of the
    settings, which is strict by default, see `make_split`. Validation is drawn from training if there is none. Items
    without a label are left out. If the settings name `val` as the part to measure on, the test part is left out.
    Memory: the vectors in float32.

    Raises:
        SettingError: more shots than a class has training items.
        UnfinishedError: the feature has missing chunks.
        DataError: a part is empty, there is only one class, no item has a label, or the column `split` names no part.
        CorruptError: bytes differ from their checksum.
    """
    feature = open_input(cache, settings.modality, settings.feature)
    feature.require_complete()
    items = read_items([cache], [feature])
    if settings.selection is not None:
        items = items.select(read_selection(settings.selection, [cache]))

    is_labeled = has_label(cache, items.samples, column=settings.label)
    if not is_labeled.any():
        raise DataError(
            f"column {settings.label!r} of {cache.path}: expected labels, got none for {len(is_labeled):,} items; name "
            "another column with --label"
        )
    items = items.where(is_labeled)
    num_unlabeled = int((~is_labeled).sum())

    part_S, group_S, rule, cosines = _parts(cache, feature, items, settings, progress or NullProgress())
    parts = part_S[items.samples]
    used_items = items.where(parts != "")
    parts = parts[parts != ""]
    counts = {part: int((parts == part).sum()) for part in PARTS}
    for part in PARTS:
        if not counts[part]:
            listed = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
            raise DataError(
                f"{cache.path}: expected {part} items with {feature.name} and a label, got none ({listed}; {rule}); "
                "label more items, or use another --split"
            )

    # Classes are checked before the vectors are read, as reading takes longest.
    labels = read_labels(cache, used_items.samples, column=settings.label)
    _check_classes(cache, settings, labels, is_training=parts == "train")

    return LabeledFeature(
        feature=feature,
        names=labels.names,
        items=used_items,
        examples=Examples(
            vectors=_read_vectors(feature, used_items.rows, progress or NullProgress()), labels=labels.numbers
        ),
        parts=parts,
        groups=group_S[used_items.samples],
        split_rule=rule,
        cosines=cosines,
        num_unlabeled=num_unlabeled,
        num_left_out=int((~cache.removed_items(feature.modality)).sum()) - num_unlabeled - len(used_items.rows),
    )


def _check_classes(cache: Cache, settings: ProbeSettings, labels: Labels, *, is_training: Bools) -> None:
    """Check that training items have two classes, and enough items of each for the shots."""
    classes, num_items = np.unique(labels.numbers[is_training], return_counts=True)

    # Every classifier is right on a single class.
    if len(classes) < 2:
        raise DataError(
            f"column {settings.label!r} of {cache.path}: expected at least two classes among the training items, got "
            f"only {labels.names[classes[0]]!r}"
        )

    if max(settings.shots, default=0) > num_items.min():
        smallest = labels.names[classes[num_items.argmin()]]
        raise SettingError(
            f"shots: expected at most {num_items.min():,}, the training items of class {smallest!r}, got "
            f"{max(settings.shots):,}"
        )


def _parts(
    cache: Cache, feature: InputFeature, items: Items, settings: ProbeSettings, progress: Progress
) -> tuple[Array, Ints, str, Mapping[str, float]]:
    """Return the (S,) part of each sample, or "", its (S,) group, the rule in words, and near-duplicates' limits."""
    split = settings.split
    part = settings.part
    is_default = split.kind == "strict" and "split" not in to_flat(settings)
    group_S = np.arange(cache.info.num_samples)

    # A split that was asked for goes before the column of the cache.
    if _SPLIT in cache.columns and (split.kind == "column" or is_default):
        names = cache.column(_SPLIT)
        part_S: Array = column_parts(names).to_numpy(zero_copy_only=False).astype("<U5")
        values = sorted(set(map(str.lower, map(str, pc.unique(names).to_pylist()))))
        group_S[items.samples[::-1]] = items.contents[::-1]  # the first item decides, so copies are not divided
        rule = f"column {_SPLIT!r}"
        cosines = split.cosines
    else:
        reader = {feature.modality: feature.read}
        divided = make_split([cache], Pairs(first=items, second=items), split, reader, progress=progress)
        part_S = np.full(cache.info.num_samples, "", "<U5")
        values = []
        for name in PARTS:
            mask_S = divided.mask(name)
            part_S[mask_S] = name
            if mask_S.any():
                values.append(name)
        group_S = np.array(divided.groups)
        rule = f"{split.path or 'split'} ({divided.line()})".removesuffix(" ()")
        cosines = divided.cosines

    names_present = set(np.unique(part_S).tolist())
    if not {"train", part} <= names_present:
        next_step = ""
        for name in ("val", "test"):
            if {"train", name} <= names_present:
                next_step = f"; use another part: --part {name}"
        raise DataError(
            f"parts of {cache.path} by {rule}: expected train and {part}, got {', '.join(values)}{next_step}"
        )

    # The measured part is called `test` from here on; the real test part is not touched.
    if part != "test":
        part_S[part_S == "test"] = ""
        part_S[part_S == part] = "test"
        rule += f", {part} is held out"

    # Hyperparameters are chosen on validation, so that the test part is only measured.
    if not (part_S == "val").any():
        train = np.intersect1d(items.samples, np.flatnonzero(part_S == "train"))
        quota = round(split.val_fraction * len(train))
        draw = draw_groups(Keys([cache], train), number_values(group_S[train]), [quota], split.seed)
        part_S[train[draw == 0]] = "val"
        rule += f", {split.val_fraction:.0%} of train for validation"
    return part_S, group_S, f"parts by {rule}", cosines


def _read_vectors(feature: InputFeature, rows: Ints, progress: Progress) -> Floats:
    """Read the vectors of some rows and compare checksums: (M, D) float32."""
    position_N = np.full(feature.num_items, -1)
    position_N[rows] = np.arange(len(rows))
    vectors_MD = np.empty((len(rows), feature.width), np.float32)

    # All blocks are read, as a checksum covers a whole chunk.
    progress.start(f"loading {feature.name}", feature.num_items, noun(feature.modality))
    for rows_B, inputs in feature.blocks():
        position_B = position_N[rows_B]
        is_kept = position_B >= 0
        vectors_MD[position_B[is_kept]] = to_mean_vectors(inputs)[is_kept]
        progress.advance(len(rows_B))
    progress.finish()
    return vectors_MD
