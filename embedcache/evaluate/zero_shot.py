"""Zero-shot classification of trained runs on two caches: the items, such as images, and the prompts of the classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.labels import Prompts, check_prompts, class_vectors, has_label, read_labels, read_prompts
from embedcache.dataset.matches import ItemSet
from embedcache.dataset.pairs import Items, read_items
from embedcache.errors import DataError, pluralize
from embedcache.evaluate.runs import (
    EvalSplit,
    Overlap,
    RunPaths,
    find_overlap,
    iterate_recipes,
    largest_overlap,
    load_runs,
    read_class_names,
    read_eval_split,
    report_line,
    run_input,
)
from embedcache.evaluate.settings import ZeroShotSettings
from embedcache.files import AnyPath
from embedcache.metrics import (
    Estimate,
    bootstrap_class_mean,
    chance_estimate,
    class_means,
    count_confusion,
    hit_rates,
    over_seeds,
    rank_labels,
    recall_at,
    top_classes,
)
from embedcache.modalities import count_items, noun
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.search.concepts import is_names, open_names
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import ZeroShotOptions

KS = (1, 5)
_ACCURACIES = {"acc1": 1, "acc5": 5}
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class ZeroShotPredictions:
    """Predicted classes of the items of one part with one run.

    Args:
        modality: modality of the items, which the run pairs with texts.
        items: items that have a label.
        num_prompts: (C,) number of prompts of each class.
        labels: (N,) true class of each item.
        ranks: (N,) rank of the true class. The top has rank 1.
        predicted: (N, K) classes with the highest scores, best first.
        is_named: (C,) whether a class of the run's prototypes has the name of each class, None without prototypes.
    """

    seed: int
    split: EvalSplit
    modality: str
    items: Items
    num_unlabeled: int
    names: list[str]
    num_prompts: Ints
    labels: Ints
    ranks: Ints
    predicted: Ints
    overlap: Overlap | None
    is_named: Bools | None = None

    @property
    def clusters(self) -> Ints:
        """Near-duplicate group of each item: (N,) int64. Groups are resampled for intervals."""
        clusters_N: Ints = self.split.groups[self.items.samples]
        return clusters_N

    @property
    def is_unnamed(self) -> Bools:
        """Whether no prototype of the run names the class of each item: (N,) bool."""
        assert self.is_named is not None
        is_unnamed_N: Bools = ~self.is_named[self.labels]
        return is_unnamed_N


@dataclass(frozen=True, kw_only=True)
class ZeroShotReport:
    """Accuracies of the seeds of one recipe, with the chance level.

    Args:
        part: description of the part.
        modality: modality of the items.
        names: names of the classes.
        num_prompts: smallest and largest number of prompts of a class.
        num_items: labeled items per run.
        num_unlabeled: items without a label, left out.
        accuracies: `acc1`, `acc5` and `mean_per_class_recall` -> mean over runs and items, with a 95% interval from
            resampling near-duplicate groups.
        over_seeds: the same accuracies with 95% intervals that also cover the variance of seeds, empty for one run.
        chance: accuracies of classes drawn at random.
        by_class: (C,) accuracy of each class, NaN for a class without items.
        confusion: (C, C) number of items by true class and predicted class, summed over runs.
        by_seed: `acc1` of each run, in the order of `seeds`.
        seeds: random seed of each run.
        overlap: the largest overlap of a run with its training part, None if it was not checked.
        run_paths: folder of each run.
        prompts_path: cache of the prompts.
        unnamed: accuracies of items whose class no prototype of the runs names, among all classes. Empty without
            prototypes, or if there are no such items.
        num_named: number of classes that are named by prototypes, None without prototypes.

    Example:
        >>> report = embedcache.evaluate_zero_shot("labeled", "run", "colors.txt", part="test")
        >>> len(report.names), report.confusion.shape, int(report.confusion.sum())
        (6, (6, 6), 60)
    """

    part: str
    modality: str
    names: list[str]
    num_prompts: tuple[int, int]
    num_items: int
    num_unlabeled: int
    accuracies: Mapping[str, Estimate]
    over_seeds: Mapping[str, Estimate]
    chance: Mapping[str, Estimate]
    by_class: Array
    confusion: Ints
    by_seed: list[float]
    seeds: list[int]
    overlap: Overlap | None
    run_paths: Sequence[Path]
    prompts_path: Path
    unnamed: Mapping[str, Estimate] = field(default_factory=dict)
    num_named: int | None = None

    def __repr__(self) -> str:
        """Return `line`, and below it the accuracies with their chance levels, for notebooks and `print`."""
        values = []
        for name, accuracy in self.accuracies.items():
            values.append(f"{name} {accuracy}, chance {self.chance[name].value:.3f}")
        return f"{self.line()}\n{'; '.join(values)}"

    def line(self) -> str:
        """Summarize the measurement in one line, with a warning if the part overlaps with the training part."""
        fewest, highest = self.num_prompts
        prompts = pluralize(highest, "prompt") if fewest == highest else f"{fewest:,} to {highest:,} prompts"
        classes = pluralize(len(self.names), "class", "classes")
        counts = f"{count_items(self.num_items, self.modality)}, {classes} of {prompts}"
        counts += f" ({self.num_unlabeled:,} without a label left out)" if self.num_unlabeled else ""
        counts += "" if self.num_named is None else f", {self.num_named:,} of the classes are named by prototypes"
        return report_line(f"{self.part}: {counts}", self.seeds, self.by_seed, "top-1", self.warning)

    @property
    def warning(self) -> str | None:
        """Warning that the results are too high, or None."""
        return self.overlap.warning if self.overlap else None


def evaluate_zero_shot(
    cache: AnyPath,
    run: RunPaths,
    prompts: AnyPath,
    settings: ZeroShotSettings | None = None,
    *,
    is_control: bool = False,
    progress: AnyProgress = None,
    **options: Unpack["ZeroShotOptions"],
) -> ZeroShotReport:
    """Classify the items of a cache with a run, or with the seeds of one recipe, which are averaged.

    The items are of the modality that the run pairs with texts, such as images, audio, videos or point clouds. Memory:
    a block of items and their scores, and the prompts.

    Args:
        cache: cache with the runs' feature of that modality, and labels: names of classes, or their numbers from 0.
        run: one run, or seeds of one recipe.
        prompts: cache with the text feature of the runs, written by `extract prompts:…`, or a `.txt` with the name of a
            class per line, see `open_names`.
        settings: label column, part and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        is_control: require that the runs were trained on shuffled pairs.
        progress: progress in items.

    Raises:
        SettingError: no run, two runs of one seed, or a control that was not trained on shuffled pairs.
        FingerprintError: a run was trained on features from another encoder, or with another recipe than the others.
        UnknownNameError: there is no such column.
        DataError: a run without texts, the part is empty, no item has a label, a label is not a class, or a class has
            no prompt.

    Example:
        >>> report = embedcache.evaluate_zero_shot("labeled", "run", "colors.txt", part="test")
        >>> report.num_items, sorted(report.accuracies)
        (60, ['acc1', 'acc5', 'mean_per_class_recall'])
    """
    settings = merge_settings(ZeroShotSettings, settings, options)
    cache = Cache(cache)
    runs = load_runs(run, is_control=is_control, device=settings.device)
    progress = to_progress(progress)

    # A list of names is encoded by the text encoder of the runs.
    if is_names(prompts):
        text = runs[0].input("text")
        prompts_cache = open_names(prompts, text.spec, text.feature, text.fingerprint, progress=progress)
    else:
        prompts_cache = Cache(prompts)

    predictions = [classify(cache, run, prompts_cache, settings, progress=progress) for run in runs]
    return _summarize(predictions, runs, prompts_cache)


def _summarize(predictions: Sequence[ZeroShotPredictions], runs: Sequence[Run], prompts_cache: Cache) -> ZeroShotReport:
    """Estimate the accuracies of all runs together. Their items are pooled."""
    first = predictions[0]
    num_classes = len(first.names)
    accuracies = _accuracies(predictions)

    # Prototypes know the names of their classes, so other classes are also reported by themselves.
    labels_N = np.concatenate([prediction.labels for prediction in predictions])
    unnamed: Mapping[str, Estimate] = {}
    if first.is_named is not None and not first.is_named[labels_N].all():
        unnamed = _accuracies(predictions, is_unnamed_only=True)

    # One run says nothing about the variance of seeds.
    by_run = _accuracies_by_run(predictions)
    clusters = [prediction.clusters for prediction in predictions]
    predicted_N = np.concatenate([prediction.predicted[:, 0] for prediction in predictions])
    is_right_N = np.concatenate([prediction.ranks for prediction in predictions]) == 1
    return ZeroShotReport(
        part=first.split.part,
        modality=first.modality,
        names=first.names,
        num_prompts=(int(first.num_prompts.min()), int(first.num_prompts.max())),
        num_items=len(first.labels),
        num_unlabeled=first.num_unlabeled,
        accuracies=accuracies,
        over_seeds=over_seeds(accuracies, by_run, clusters) if len(runs) > 1 else {},
        chance={
            "acc1": chance_estimate(1 / num_classes, len(labels_N)),
            "acc5": chance_estimate(min(1, 5 / num_classes), len(labels_N)),
            "mean_per_class_recall": chance_estimate(1 / num_classes, len(labels_N)),
        },
        by_class=class_means(is_right_N, labels_N, num_classes),
        confusion=count_confusion(labels_N, predicted_N, num_classes),
        by_seed=by_run["acc1"],
        seeds=[prediction.seed for prediction in predictions],
        overlap=largest_overlap(prediction.overlap for prediction in predictions),
        run_paths=[run.path for run in runs],
        prompts_path=prompts_cache.path,
        unnamed=unnamed,
        num_named=None if first.is_named is None else int(first.is_named.sum()),
    )


def _accuracies(predictions: Sequence[ZeroShotPredictions], *, is_unnamed_only: bool = False) -> dict[str, Estimate]:
    """Estimate the accuracies of all runs together, on all items or on items whose class no prototype names."""
    ranks = []
    clusters = []
    labels = []
    for prediction in predictions:
        mask_N = prediction.is_unnamed if is_unnamed_only else np.ones(len(prediction.labels), bool)
        ranks.append(prediction.ranks[mask_N])
        clusters.append(prediction.clusters[mask_N])
        labels.append(prediction.labels[mask_N])

    # Classes count equally in the mean, however many items they have.
    accuracies = hit_rates(ranks, clusters, _ACCURACIES)
    is_right_N = np.concatenate(ranks) == 1
    accuracies["mean_per_class_recall"] = bootstrap_class_mean(
        is_right_N, np.concatenate(labels), np.concatenate(clusters)
    )
    return accuracies


def _accuracies_by_run(predictions: Sequence[ZeroShotPredictions]) -> dict[str, list[float]]:
    """Compute each accuracy of each run."""
    by_run: dict[str, list[float]] = {}
    for name, k in _ACCURACIES.items():
        by_run[name] = [recall_at(prediction.ranks, k) for prediction in predictions]

    # A class without items has the mean NaN.
    by_run["mean_per_class_recall"] = []
    for prediction in predictions:
        recalls_C = class_means(prediction.ranks == 1, prediction.labels, len(prediction.names))
        by_run["mean_per_class_recall"].append(float(np.nanmean(recalls_C)))
    return by_run


def compare_zero_shot(
    cache: AnyPath,
    run: RunPaths,
    prompts: AnyPath,
    settings: ZeroShotSettings | None = None,
    *,
    control_run: RunPaths = (),
    progress: AnyProgress = None,
    **options: Unpack["ZeroShotOptions"],
) -> dict[str, ZeroShotReport]:
    """Evaluate several recipes. Seeds of one recipe are averaged.

    Args:
        cache: cache of labeled items.
        run: runs of any recipes.
        prompts: cache of prompts, or a `.txt` of names.
        settings: label column, part and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        control_run: runs trained on shuffled pairs.
        progress: progress in items.

    Returns:
        Name of the recipe -> report.

    Example:
        >>> list(embedcache.compare_zero_shot("labeled", ["run"], "colors.txt", part="test"))
        ['run']
    """
    progress = to_progress(progress)

    reports = {}
    for recipe in iterate_recipes(run, control_run):
        reports[recipe.name] = evaluate_zero_shot(
            cache,
            recipe.run_paths,
            prompts,
            settings,
            is_control=recipe.is_control,
            progress=progress,
            **options,
        )
    return reports


def classify(
    cache: Cache,
    run: Run,
    prompts_cache: Cache,
    settings: ZeroShotSettings | None = None,
    *,
    progress: Progress | None = None,
) -> ZeroShotPredictions:
    """Classify the items of one part with one run. `evaluate_zero_shot` lists the errors."""
    settings = settings or ZeroShotSettings(check_overlap=False)
    if "text" not in run.info.inputs:
        raise DataError(
            f"run {run.path}: expected one with the modality text, which prompts have, got one of "
            f"{' and '.join(run.info.inputs)}; train one with texts"
        )

    # Prompts must come from the encoder whose text feature the run was trained on.
    modality = run.other_modality("text")
    check_prompts(prompts_cache, run.input("text").spec)
    prompts = read_prompts(prompts_cache, run_input(prompts_cache, run, "text"))
    feature = run_input(cache, run, modality)
    split = read_eval_split(cache, run, settings.part, settings.selection)
    items = read_items([cache], [feature], is_numbered=False).select(split.samples)
    if not len(items.rows):
        raise DataError(
            f"{split.part} of {cache.path}: expected {noun(modality)} with {feature.name}, got none; check --part"
        )

    is_labeled = has_label(cache, items.samples, column=settings.label)
    items = items.where(is_labeled)
    num_unlabeled = int((~is_labeled).sum())
    if not len(items.rows):
        raise DataError(
            f"column {settings.label!r} of {cache.path}: expected labels, got none for {num_unlabeled:,} "
            f"{noun(modality)} of {split.part}; name another column with --label"
        )

    # Labels are checked before the items are projected, as a label that is not a class stops the evaluation.
    labels = read_labels(cache, items.samples, column=settings.label, classes=prompts.names).numbers
    class_names = read_class_names(run)
    ranks, predicted = _rank(run, feature, items.rows, labels, prompts, progress or NullProgress())
    return ZeroShotPredictions(
        seed=run.seed,
        split=split,
        modality=modality,
        items=items,
        num_unlabeled=num_unlabeled,
        names=prompts.names,
        num_prompts=prompts.counts,
        labels=labels,
        ranks=ranks,
        predicted=predicted,
        overlap=find_overlap(run, cache, {modality: ItemSet(feature, items)}, settings, progress=progress),
        is_named=None if class_names is None else class_names.are_in(prompts.names),
    )


def _rank(
    run: Run, feature: InputFeature, rows: Ints, labels: Ints, prompts: Prompts, progress: Progress
) -> tuple[Ints, Ints]:
    """Compute the (N,) rank of each item's class and the (N, K) classes with the highest scores."""
    classes_CP = class_vectors(prompts, run.pair.tower("text"), device=run.device)
    ranks = []
    predicted = []
    tower = run.pair.tower(feature.modality)

    # Blocks keep memory independent of the number of items.
    progress.start("classifying", len(rows), noun(feature.modality))
    for block in blocks(len(rows), _BLOCK):
        scores_BC = project(tower, feature.read(rows[block]), device=run.device) @ classes_CP.T
        ranks.append(rank_labels(scores_BC, labels[block]))
        predicted.append(top_classes(scores_BC, labels[block], min(max(KS), scores_BC.shape[1])))
        progress.advance(len(scores_BC))
    progress.finish()
    return np.concatenate(ranks), np.concatenate(predicted)
