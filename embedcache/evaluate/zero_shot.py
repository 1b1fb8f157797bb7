"""Zero-shot classification of trained runs, from two caches: the images, and the prompts of the classes.

One vector a class, from cached prompts that a run projects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Floats, Ints, blocks, mean_directions
from embedcache.dataset import prompts as cached
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.labels import has_label, read_labels
from embedcache.dataset.pairs import Items, items_of
from embedcache.dataset.prompts import Prompts
from embedcache.errors import DataError
from embedcache.evaluate.held_out import Held, Looked, Overlap, find_overlap, held_out, worst
from embedcache.evaluate.runs import Run, RunPaths, load_runs, seeds_line, trained_side
from embedcache.metrics.classification import class_means, confusion, ranks_of
from embedcache.metrics.intervals import Estimate, bootstrap_class_mean, bootstrap_means, chance_estimate
from embedcache.projectors.saved import project
from embedcache.store.cache import Cache

KS = (1, 5)
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Classified:
    """One run on one part: each image's class, and the classes it was given.

    Args:
        seed: of the run.
        held: what was measured.
        items: the images that have a label.
        num_unlabeled: the others.
        names: of the classes.
        num_prompts: (C,) of each class.
        labels: (I,) the true class of each image.
        ranks: (I,) rank of the true class, 1 is the top.
        predicted: (I, K) the classes that score best, best first.
        overlap: with the training part; None where it was not asked for.
    """

    seed: int
    held: Held
    items: Items
    num_unlabeled: int
    names: list[str]
    num_prompts: Ints
    labels: Ints
    ranks: Ints
    predicted: Ints
    overlap: Overlap | None


@dataclass(frozen=True, kw_only=True)
class ZeroShotReport:
    """Accuracies of one or several runs, with what chance gives.

    Args:
        part: what was measured.
        names: of the classes.
        num_prompts: fewest and most of a class.
        num_images: with a label, a run.
        num_unlabeled: images without one, left out.
        accuracies: `acc1`, `acc5` and `mean_per_class_recall` -> mean over runs and images, with a 95 % interval from
            resampling groups of near-duplicates.
        chance: alike, of drawing classes at random.
        by_class: (C,) accuracy of each class, NaN for a class without an image.
        confusion: (C, C) images by true class and predicted class, all runs together.
        by_seed: `acc1` of each run, in the order of `seeds`.
        seeds: of the runs.
        overlaps: of each run, where they were asked for.
    """

    part: str
    names: list[str]
    num_prompts: tuple[int, int]
    num_images: int
    num_unlabeled: int
    accuracies: dict[str, Estimate]
    chance: dict[str, Estimate]
    by_class: Array
    confusion: Ints
    by_seed: list[float]
    seeds: list[int]
    overlaps: list[Overlap]

    def line(self) -> str:
        """Say what was measured, in one line, and warn where it is not held out."""
        fewest, most = self.num_prompts
        prompts = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        counts = f"{self.num_images:,} images, {len(self.names):,} classes of {prompts} prompts"
        counts += f" ({self.num_unlabeled:,} without a label left out)" if self.num_unlabeled else ""
        seeds = seeds_line(self.seeds, self.by_seed, "top-1")
        said = f"{self.part}: {counts}; {seeds}; 95 % intervals over images, near-duplicates together"
        return "; ".join([said, *filter(None, [self.warning])])

    @property
    def overlap(self) -> Overlap | None:
        """The worst of any run's."""
        return worst(self.overlaps)

    @property
    def warning(self) -> str | None:
        """What makes the figures doubtful, where something does."""
        return self.overlap.warning if self.overlap else None


def evaluate_zero_shot(
    cache_path: Path | str,
    run_paths: RunPaths,
    prompts_path: Path | str,
    *,
    label: str = "label",
    part: str | None = None,
    is_control: bool = False,
    trained_on: Sequence[Path | str] = (),
    compares: bool = True,
) -> ZeroShotReport:
    """Classify the images of a cache with trained runs and cached prompts.

    Several runs (seeds) are averaged; all must have been trained on the same features. Memory: a block of images and
    their scores, and the prompts.

    Args:
        cache_path: a cache with the runs' image feature, and labels.
        run_paths: a run, or several: seeds of one recipe.
        prompts_path: a cache with the runs' text feature, made by `extract prompts:…`.
        label: the column of labels: names of classes, or their numbers from 0.
        part: `test`, `val`, `train` or `all`; None is `test`, and all of another cache without such a part.
        is_control: the runs must have been trained on shuffled pairs.
        trained_on: where the caches of the training lie now; none: where they lay then.
        compares: look for what was seen in training.

    Raises:
        SettingError: no run, two of one seed, or a control that was not trained on shuffled pairs.
        FingerprintError: a run was trained on another encoder's features, or unlike the others.
        UnknownNameError: there is no such column.
        DataError: the part is empty, no image has a label, one has a label that is no class, or a class has no prompt.
    """
    cache, prompts_cache = Cache(cache_path), Cache(prompts_path)
    runs = load_runs(run_paths, is_control=is_control)
    found = [
        classify(cache, run, prompts_cache, label=label, part=part, trained_on=trained_on, compares=compares)
        for run in runs
    ]
    first, num_classes = found[0], len(found[0].names)
    labels, ranks = (np.concatenate([getattr(one, name) for one in found]) for name in ("labels", "ranks"))
    groups = np.concatenate([one.held.groups[one.items.samples] for one in found])
    predicted = np.concatenate([one.predicted[:, 0] for one in found])
    return ZeroShotReport(
        part=first.held.part,
        names=first.names,
        num_prompts=(int(first.num_prompts.min()), int(first.num_prompts.max())),
        num_images=len(first.labels),
        num_unlabeled=first.num_unlabeled,
        accuracies=_accuracies(ranks, labels, groups),
        chance=_chances(num_classes, len(labels)),
        by_class=class_means(ranks == 1, labels, num_classes),
        confusion=confusion(labels, predicted, num_classes),
        by_seed=[float(np.mean(one.ranks == 1)) for one in found],
        seeds=[one.seed for one in found],
        overlaps=[one.overlap for one in found if one.overlap],
    )


def classify(
    cache: Cache,
    run: Run,
    prompts_cache: Cache,
    *,
    label: str = "label",
    part: str | None = None,
    trained_on: Sequence[Path | str] = (),
    compares: bool = False,
) -> Classified:
    """Classify the images of one part with one run; the arguments are those of `evaluate_zero_shot`."""
    prompts, image = read_prompts(prompts_cache, run), trained_side(cache, run.config, "image")
    held = held_out(cache, run, part)
    items = items_of([cache], [image]).of(held.samples)
    if not len(items.rows):
        raise DataError(f"{held.part} of {cache.path} has no image with {image.name}")
    has_one = has_label(cache, items.samples, column=label)
    items, num_unlabeled = items.where(has_one), int((~has_one).sum())
    if not len(items.rows):
        raise DataError(f"none of {num_unlabeled:,} images of {held.part} has a label in column {label!r}")
    labels = read_labels(cache, items.samples, column=label, classes=prompts.names).numbers
    ranks, predicted = _rank(run, image, items.rows, labels, prompts)
    return Classified(
        seed=run.seed,
        held=held,
        items=items,
        num_unlabeled=num_unlabeled,
        names=prompts.names,
        num_prompts=prompts.counts,
        labels=labels,
        ranks=ranks,
        predicted=predicted,
        overlap=(
            find_overlap(run, {"image": Looked(side=image, items=items)}, trained_on=trained_on)
            if compares and part != "train"
            else None
        ),
    )


def _rank(run: Run, image: InputFeature, rows: Ints, labels: Ints, prompts: Prompts) -> tuple[Ints, Ints]:
    """Rank each image's class, and find the classes that score best: (I,) and (I, K)."""
    found = list(_ranked_blocks(run, image, rows, labels, class_vectors(prompts, run)))
    return np.concatenate([ranks for ranks, _ in found]), np.concatenate([best for _, best in found])


def _ranked_blocks(
    run: Run, image: InputFeature, rows: Ints, labels: Ints, classes_CP: Floats
) -> Iterator[tuple[Ints, Ints]]:
    for block in blocks(len(rows), _BLOCK):
        scores_BC = project(run.pair.image, image.read(rows[block])) @ classes_CP.T
        yield ranks_of(scores_BC, labels[block]), _best_classes(scores_BC)


def _best_classes(scores_BC: Floats) -> Ints:
    k = min(max(KS), scores_BC.shape[1])
    best_BK = np.argpartition(-scores_BC, k - 1, axis=1)[:, :k]
    order_BK = np.argsort(-np.take_along_axis(scores_BC, best_BK, axis=1), axis=1, kind="stable")
    ordered: Ints = np.take_along_axis(best_BK, order_BK, axis=1)
    return ordered


def _accuracies(ranks: Ints, labels: Ints, groups: Ints) -> dict[str, Estimate]:
    estimates = bootstrap_means(ranks[:, None] <= np.array(KS), groups)
    return {
        **{f"acc{k}": estimate for k, estimate in zip(KS, estimates, strict=True)},
        "mean_per_class_recall": bootstrap_class_mean(ranks == 1, labels, groups),
    }


def _chances(num_classes: int, num_images: int) -> dict[str, Estimate]:
    shares = {"acc1": 1 / num_classes, "acc5": min(1, 5 / num_classes), "mean_per_class_recall": 1 / num_classes}
    return {name: chance_estimate(share, num_images) for name, share in shares.items()}


def read_prompts(cache: Cache, run: Run) -> Prompts:
    """Find the prompts that a run can project.

    Raises:
        DataError: the cache is no prompt set, or a class has no prompt with the run's text feature.
        FingerprintError: another text encoder made the cache's feature.
        UnfinishedError: the feature has missing chunks.
    """
    cached.require_prompts(cache, run.config.text.spec)
    return cached.read_prompts(cache, trained_side(cache, run.config, "text"))


def class_vectors(prompts: Prompts, run: Run) -> Floats:
    """Project the prompts and ensemble them as the field does: normalize, mean, normalize: (C, P) float32."""
    projected_TP = project(run.pair.text, prompts.side.read(prompts.rows))
    return mean_directions(projected_TP, prompts.classes, len(prompts.names))
