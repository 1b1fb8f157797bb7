"""Image-text retrieval of trained runs, from the cache alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Floats, Ints
from embedcache.dataset.pairs import Pairs, pair_items
from embedcache.errors import DataError
from embedcache.evaluate.held_out import Looked, Overlap, find_overlap, held_out, worst
from embedcache.evaluate.runs import Run, RunPaths, load_runs, seeds_line, trained_side
from embedcache.metrics.intervals import Estimate, bootstrap_means, bootstrap_median, chance_estimate
from embedcache.metrics.ranking import average_precisions, chance_recall, first_ranks, negatives_before
from embedcache.projectors.saved import project
from embedcache.store.cache import Cache

KS = (1, 5, 10)
WAYS = ("i2t", "t2i")
_MOST_K = 100


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """One run on one part: every query's rank, and what is needed to look at its neighbors.

    Args:
        seed: of the run.
        part: what was measured.
        pairs: the items of the part.
        groups: (S,) int64, a number for each sample of the cache; near-duplicates share one.
        images: (I, P) float32, rows of length 1, in the order of `pairs.image`.
        texts: (T, P) alike, of `pairs.text`.
        positives: two (M,) arrays: image i and text j of each positive pair.
        ranks: `i2t` (I,) and `t2i` (T,): rank of the best positive among all candidates, 1 is the top.
        precisions: alike, the average precision of each query.
        overlap: with the training part; None where it was not asked for.
    """

    seed: int
    part: str
    pairs: Pairs
    groups: Ints
    images: Floats
    texts: Floats
    positives: tuple[Ints, Ints]
    ranks: dict[str, Ints]
    precisions: dict[str, Array]
    overlap: Overlap | None

    def queries(self, way: str) -> Ints:
        """Get the sample of each query."""
        return (self.pairs.image if way == "i2t" else self.pairs.text).samples


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recalls of one or several runs, with what chance gives on the same items.

    Args:
        part: what was measured.
        language: of the captions; None is all.
        recalls: way -> `r@k` -> mean over runs and queries, with a 95 % interval from resampling the split's groups.
        orders: way -> `map`, the mean average precision, and `median_rank`, alike.
        curves: way -> the recalls at k of 1, 2, … up to 100 or all candidates, means.
        chance: as `recalls`, of a random order: its expectation, and where 95 % of random orders lie.
        by_seed: the mean over both ways and all k of the recalls of each run, in the order of `seeds`.
        num_images: per run.
        num_texts: per run.
        seeds: of the runs.
        overlaps: of each run, where they were asked for.
    """

    part: str
    language: str | None
    recalls: dict[str, dict[str, Estimate]]
    orders: dict[str, dict[str, Estimate]]
    curves: dict[str, list[float]]
    chance: dict[str, dict[str, Estimate]]
    by_seed: list[float]
    num_images: list[int]
    num_texts: list[int]
    seeds: list[int]
    overlaps: list[Overlap]

    def line(self) -> str:
        """Say what was measured, in one line, and warn where the part is not held out."""
        of_language = f" in {self.language}" if self.language else ""
        counts = f"{self.num_images[0]:,} images, {self.num_texts[0]:,} captions{of_language}"
        seeds = seeds_line(self.seeds, self.by_seed, "mean recall")
        said = f"{self.part}: {counts} a run; {seeds}; 95 % intervals over groups of near-duplicates"
        return "; ".join([said, *filter(None, [self.warning])])

    @property
    def overlap(self) -> Overlap | None:
        """The worst of any run's."""
        return worst(self.overlaps)

    @property
    def warning(self) -> str | None:
        """What makes the figures doubtful, where something does."""
        return self.overlap.warning if self.overlap else None


def evaluate_retrieval(
    cache_path: Path | str,
    run_paths: RunPaths,
    *,
    part: str | None = None,
    language: str | None = None,
    is_control: bool = False,
    trained_on: Sequence[Path | str] = (),
    compares: bool = True,
) -> RetrievalReport:
    """Rank the held-out items of a cache with trained runs.

    Several runs (seeds) are averaged; all must have been trained on the same features. The cache may be one that they
    were trained on, or any other with the same encoders' features. Memory: the part's features and tiles of
    similarities.

    Args:
        cache_path: the cache.
        run_paths: a run, or several: seeds of one recipe.
        part: `test`, `val`, `train` or `all`; None is `test`, and all of another cache without such a part.
        language: captions of this language; None is the language that the run was trained on.
        is_control: the runs must have been trained on shuffled pairs.
        trained_on: where the caches of the training lie now; none: where they lay then.
        compares: look for what was seen in training.

    Raises:
        SettingError: no run, two of one seed, or a control that was not trained on shuffled pairs.
        FingerprintError: a run was trained on another encoder's features, or unlike the others.
        DataError: the part is empty.
    """
    cache, runs = Cache(cache_path), load_runs(run_paths, is_control=is_control)
    rankings = [
        rank(cache, run, part=part, language=language, trained_on=trained_on, compares=compares) for run in runs
    ]
    return RetrievalReport(
        part=rankings[0].part,
        language=language or runs[0].config.training["language"],
        recalls={way: _recalls(rankings, way) for way in WAYS},
        orders={way: _orders(rankings, way) for way in WAYS},
        curves={way: _curve(rankings, way) for way in WAYS},
        chance={way: {f"r@{k}": _chance(rankings, way, k) for k in KS} for way in WAYS},
        by_seed=[_mean_recall(ranking) for ranking in rankings],
        num_images=[len(ranking.images) for ranking in rankings],
        num_texts=[len(ranking.texts) for ranking in rankings],
        seeds=[ranking.seed for ranking in rankings],
        overlaps=[ranking.overlap for ranking in rankings if ranking.overlap],
    )


def rank(
    cache: Cache,
    run: Run,
    *,
    part: str | None = None,
    language: str | None = None,
    trained_on: Sequence[Path | str] = (),
    compares: bool = False,
) -> Ranking:
    """Project and rank one part of a cache with one run, both ways; the arguments are those of `evaluate_retrieval`.

    Raises:
        FingerprintError: the run was trained on other features.
        DataError: the part is empty.
    """
    image, text = trained_side(cache, run.config, "image"), trained_side(cache, run.config, "text")
    held = held_out(cache, run, part)
    language = language or run.config.training["language"]
    pairs = pair_items([cache], [image], [text], language=language).of(held.samples)
    if not len(pairs.samples):
        raise DataError(f"{held.part} of {cache.path} has no sample with both features")
    looked = {"image": Looked(side=image, items=pairs.image), "text": Looked(side=text, items=pairs.text)}
    images = project(run.pair.image, image.read(pairs.image.rows))
    texts = project(run.pair.text, text.read(pairs.text.rows))
    image_M, text_M = pairs.positives()
    before = {
        "i2t": (image_M, negatives_before(images, texts, (image_M, text_M))),
        "t2i": (text_M, negatives_before(texts, images, (text_M, image_M))),
    }
    return Ranking(
        seed=run.seed,
        part=held.part,
        pairs=pairs,
        groups=held.groups,
        images=images,
        texts=texts,
        positives=(image_M, text_M),
        ranks={way: first_ranks(*found) for way, found in before.items()},
        precisions={way: average_precisions(*found) for way, found in before.items()},
        overlap=find_overlap(run, looked, trained_on=trained_on) if compares and part != "train" else None,
    )


def _recalls(rankings: Sequence[Ranking], way: str) -> dict[str, Estimate]:
    ranks = np.concatenate([ranking.ranks[way] for ranking in rankings])
    estimates = bootstrap_means(ranks[:, None] <= np.array(KS), _groups(rankings, way))
    return {f"r@{k}": estimate for k, estimate in zip(KS, estimates, strict=True)}


def _curve(rankings: Sequence[Ranking], way: str) -> list[float]:
    ranks = np.concatenate([ranking.ranks[way] for ranking in rankings])
    num_candidates = max(len(ranking.texts if way == "i2t" else ranking.images) for ranking in rankings)
    return [float(np.mean(ranks <= k)) for k in range(1, min(_MOST_K, num_candidates) + 1)]


def _orders(rankings: Sequence[Ranking], way: str) -> dict[str, Estimate]:
    groups = _groups(rankings, way)
    precisions, ranks = (
        np.concatenate([getattr(ranking, name)[way] for ranking in rankings]) for name in ("precisions", "ranks")
    )
    return {
        "map": bootstrap_means(precisions[:, None], groups)[0],
        "median_rank": bootstrap_median(ranks, groups),
    }


def _groups(rankings: Sequence[Ranking], way: str) -> Ints:
    return np.concatenate([ranking.groups[ranking.queries(way)] for ranking in rankings])


def _mean_recall(ranking: Ranking) -> float:
    return float(np.mean([np.mean(ranking.ranks[way] <= k) for way in WAYS for k in KS]))


def _chance(rankings: Sequence[Ranking], way: str, k: int) -> Estimate:
    expected, num_queries = [], 0
    for ranking in rankings:
        query_M = ranking.positives[WAYS.index(way)]
        num_candidates = len(ranking.texts if way == "i2t" else ranking.images)
        expected.append(chance_recall(np.bincount(query_M), num_candidates, k))
        num_queries += len(ranking.ranks[way])
    return chance_estimate(float(np.mean(expected)), num_queries)
