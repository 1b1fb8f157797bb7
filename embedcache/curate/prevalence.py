"""How many items show a concept: an estimate with an interval, from the similarities of the items to it.

A cosine has no absolute meaning: the items of one concept begin at .3, those of another at .6. The relative score of an
item is 0 at the median of the concept's similarities, which is background for any concept that most items do not show,
and 1 at the concept's reach, the similarity of its typical best items. Items of the concept are expected in the upper
half. Where the cut really lies is unknown without labels, so the interval spans the cuts that labeled collections had
(docs/about/results.md), and a person's answers about some items narrow it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, log_expit
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.errors import DataError, FingerprintError, PathError
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.outputs import read_report_json, write_report_json
from embedcache.processes import num_cores
from embedcache.provenance import construct
from embedcache.store.cache import Cache

COUNTED, CERTAIN, POSSIBLE = 0.55, 0.9, 0.25
"""Relative scores above which items are counted, are almost certain, and may show the concept."""
STRIP_ITEMS = 24
SAMPLE = 65_536
"""Items drawn for the scale of each concept, which is exact if the pool has no more."""
STRIP_SAMPLE = 4_096
"""Items of the sample among which those are ranked that a person is asked about."""

_CONCEPTS_PER_BLOCK = 32
_ROUNDING = 1e-5  # two ways of summing one cosine in float32
_ONE_DEVIATION_BELOW = 0.158655  # quantile of a normal distribution one standard deviation below its mean
_TILT = 3.0
_MIN_REACH = 3.4  # 94% of normal samples of any size reach less far
_MIN_SPREAD = 1e-5  # two ways of summing one cosine in float32
_SAMPLING = 1.3
_CUTS = np.linspace(-1, 2, 121)
_WIDTHS = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
_MIN_SPREAD_OF_LOG = 0.4


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Scale of the relative scores of C concepts.

    Args:
        medians: (C,) float32, cosine of the median item.
        spreads: (C,) float32, standard deviation of the background, measured below the median, where items of the
            concept do not widen it.
        reaches: (C,) float32, how far the best items are above the median, in spreads: the mean of the standardized
            scores z weighted by exp(3 z), which does not grow with the number of items; 3 for a normal background. It
            is averaged with that of all items but the best, or the only exact match would decide alone.
    """

    medians: Floats
    spreads: Floats
    reaches: Floats

    @property
    def separates(self) -> Bools:
        """Whether some items are further from the background than chance explains: (C,)."""
        is_separate_C: Bools = (self.reaches >= _MIN_REACH) & (self.spreads > _MIN_SPREAD)
        return is_separate_C

    def cosines(self, score: float) -> Floats:
        """Return the cosine of each concept at a relative score; up to 1, an item of the sample is not below: (C,)."""
        cosines_C: Floats = (self.medians + score * self.reaches * self.spreads).astype(np.float32)
        return cosines_C

    def scores(self, number: int, cosines: Floats) -> Floats:
        """Return the relative scores of items by their cosines to one concept: (A,)."""
        scores_A: Floats = (cosines - self.medians[number]) / (self.reaches[number] * self.spreads[number])
        return scores_A


def measure_scale(sims_CS: Floats) -> Scale:
    """Measure the scale of C concepts by their cosines to a random sample of S items.

    The background is estimated from the median downwards, as an empirical null is ("Large-Scale Simultaneous Hypothesis
    Testing: The Choice of a Null Hypothesis", Efron, JASA 2004, fits the center). Memory: four times the cosines.
    """
    ranks = np.round(np.array([_ONE_DEVIATION_BELOW, 0.5]) * (sims_CS.shape[1] - 1)).astype(np.int64)
    partitioned_CS = np.partition(sims_CS, ranks, axis=1)
    low_C, medians_C = partitioned_CS[:, ranks[0]], partitioned_CS[:, ranks[1]]
    spreads_C = np.maximum(medians_C - low_C, np.float32(_MIN_SPREAD))

    standardized_CS = (sims_CS - medians_C[:, None]) / spreads_C[:, None]
    reaches_C: Floats = _tilted_mean(standardized_CS)
    standardized_CS[np.arange(len(reaches_C)), standardized_CS.argmax(axis=1)] = -np.inf
    if sims_CS.shape[1] > 1:
        reaches_C = (reaches_C + _tilted_mean(standardized_CS)) / np.float32(2)
    return Scale(medians=medians_C, spreads=spreads_C, reaches=reaches_C)


def _tilted_mean(standardized_CS: Floats) -> Floats:
    """Return the mean of the scores of each concept, weighted by exp(3 z): (C,)."""
    highest_C1 = standardized_CS.max(axis=1, keepdims=True)
    weights_CS = np.exp(_TILT * (standardized_CS - highest_C1))
    below_CS = np.where(weights_CS > 0, standardized_CS - highest_C1, 0)
    mean_C: Floats = highest_C1[:, 0] + (below_CS * weights_CS).sum(axis=1) / weights_CS.sum(axis=1)
    return mean_C


@dataclass(frozen=True, kw_only=True)
class Background:
    """Similarities of C concepts to a random sample of a pool.

    Args:
        num_items: size of the sample.
        scale: where the background of each concept lies, and how far its best items are above it.
        thresholds: (C,) float32, cosine above which items are counted; the best item of the sample is above it.
        certain: (C,) float32, cosine above which an item almost certainly shows the concept.
        possible: (C,) int64, items of the sample that may show the concept.
        floors: (C,) float32, below the k-th best of the sample, and so below that of the pool.
        strips: (C, R) int64, positions in the sample of items of all ranks, best first.
        strip_cosines: (C, R) float32, their similarities.
    """

    num_items: int
    scale: Scale
    thresholds: Floats
    certain: Floats
    possible: Ints
    floors: Floats
    strips: Ints
    strip_cosines: Floats


def estimate_background(concepts_CP: Floats, sample_SP: Floats, k: int) -> Background:
    """Compare concepts with a sample of at least k items in random order, rows of length 1.

    Memory: per core, six times the similarities of 32 concepts, 50 MB for a sample of 65,536.
    """
    ranks_R = strip_ranks(min(STRIP_SAMPLE, len(sample_SP)))

    def compare(block: slice) -> Iterator[Array]:
        sims_BS = concepts_CP[block] @ sample_SP.T
        scale = measure_scale(sims_BS)
        yield from (scale.medians, scale.spreads, scale.reaches)
        yield (sims_BS > scale.cosines(POSSIBLE)[:, None]).sum(axis=1)
        yield np.partition(sims_BS, -k, axis=1)[:, -k] - np.float32(_ROUNDING)
        strips = np.argsort(-sims_BS[:, :STRIP_SAMPLE], axis=1, kind="stable")[:, ranks_R]
        yield from (strips, np.take_along_axis(sims_BS, strips, axis=1))

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_cores()) as pool:
        parts = list(pool.map(lambda block: list(compare(block)), blocks(len(concepts_CP), _CONCEPTS_PER_BLOCK)))
    columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
    medians, spreads, reaches, possible, floors, strips, strip_cosines = columns

    scale = Scale(medians=medians, spreads=spreads, reaches=reaches)
    return Background(
        num_items=len(sample_SP),
        scale=scale,
        thresholds=scale.cosines(COUNTED),
        certain=scale.cosines(CERTAIN),
        possible=possible,
        floors=floors,
        strips=strips,
        strip_cosines=strip_cosines,
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated numbers of items of C concepts, with 95% intervals; NaN if nothing can be told.

    Args:
        counts: (C,) float64.
        lows: (C,) lower bounds.
        highs: (C,) upper bounds.
    """

    counts: Array
    lows: Array
    highs: Array


def estimate_counts(above_C: Array, assigned_C: Array, certain_C: Array, possible_C: Array, num_items: int) -> Estimate:
    """Estimate the items of concepts without any label.

    A counted item may belong to a related concept, and an item that another concept fits better may belong to
    both, as birds are animals. So the estimate is the geometric mean of all counted items and of those that have the
    concept as their best one. The interval reaches from the certain items to the possible ones.

    Args:
        above_C: items above `COUNTED`.
        assigned_C: those of them whose best concept it is.
        certain_C: items whose best concept it is that are above `CERTAIN`.
        possible_C: items above `POSSIBLE`.
        num_items: number of all items.
    """
    counts_C = np.sqrt(np.maximum(above_C, 1) * np.maximum(assigned_C, 1))
    highs_C = np.clip(_SAMPLING * possible_C, counts_C, num_items)
    return Estimate(counts=np.minimum(counts_C, highs_C), lows=certain_C / _SAMPLING, highs=highs_C)


def strip_ranks(num_sampled: int) -> Array:
    """Return the ranks, from 0, of the items about which a person is asked: spaced evenly by their logarithm."""
    ranks = np.unique(np.geomspace(1, num_sampled, 4 * STRIP_ITEMS).round().astype(np.int64)) - 1
    chosen = np.linspace(0, len(ranks) - 1, min(STRIP_ITEMS, len(ranks))).round().astype(np.int64)
    picked: Array = ranks[chosen]
    return picked


def strip_weights(num_sampled: int, num_items: int) -> Array:
    """Return how many of N items each item of the strip stands for; they sum to N."""
    ranks = strip_ranks(num_sampled)
    middles = np.sqrt((ranks[:-1] + 1.0) * (ranks[1:] + 1.0))
    edges = np.concatenate([[0.5], middles, [num_sampled + 0.5]])
    weights: Array = np.diff(edges) * num_items / num_sampled
    return weights


@dataclass(frozen=True)
class Settled:
    """The items of one concept as answers settle them, and the relative score at which half of the items show it."""

    count: float
    low: float
    high: float
    cut: float


def settle(
    prior: tuple[float, float, float],
    strip_scores: Array,
    strip_weights: Array,
    answered_scores: Array,
    answers: Sequence[bool],
) -> Settled:
    """Estimate the items of one concept from answers about some of them.

    The probability that an item shows the concept is a logistic curve of its relative score. Its cut and its width have
    a posterior on a grid: the prior of the count is log-normal around the estimate without answers, with its interval
    as 95%, and each answer is a Bernoulli trial.

    Args:
        prior: count, low and high without answers.
        strip_scores: (R,) relative scores of items of all ranks.
        strip_weights: (R,) number of items that each of them stands for.
        answered_scores: (A,) relative scores of the items that were answered.
        answers: (A,) whether each shows the concept.
    """
    count, low, high = prior
    probabilities_GWR = expit((strip_scores - _CUTS[:, None, None]) / _WIDTHS[:, None])
    counts_GW = np.maximum(probabilities_GWR @ strip_weights, 0.5)

    spread = max(np.log(high / max(low, 0.5)) / 4, _MIN_SPREAD_OF_LOG)
    density_GW = np.abs(np.gradient(np.log(counts_GW), axis=0)) + 1e-12  # so that the prior is one of the count
    log_posterior_GW = np.log(density_GW) - 0.5 * ((np.log(counts_GW) - np.log(count)) / spread) ** 2

    signs_A = np.where(np.asarray(answers, bool), 1.0, -1.0)
    logits_GWA = (answered_scores - _CUTS[:, None, None]) / _WIDTHS[:, None]
    log_posterior_GW = log_posterior_GW + log_expit(signs_A * logits_GWA).sum(axis=-1)
    posterior_GW = np.exp(log_posterior_GW - log_posterior_GW.max())
    posterior_GW /= posterior_GW.sum()

    order = np.argsort(counts_GW, axis=None)
    cumulated = np.cumsum(posterior_GW.ravel()[order])
    places = np.searchsorted(cumulated, [0.5, 0.025, 0.975]).clip(max=len(order) - 1)
    num_confirmed = float((signs_A > 0).sum())
    settled, lowest, highest = np.maximum(counts_GW.ravel()[order][places], num_confirmed)
    cut = posterior_GW.sum(axis=1) @ _CUTS
    return Settled(count=float(settled), low=float(lowest), high=float(highest), cut=float(cut))


Answers = dict[str, dict[int, bool]]
"""Name of a concept -> row of an item -> whether it shows the concept."""


def answers_path(report: Path) -> Path:
    """Return where the answers about a report are saved: `coverage.json` -> `coverage.answers.json`."""
    return report.with_name(f"{report.name.removesuffix('.json')}.answers.json")


def write_answers(path: Path, answers: Mapping[str, Mapping[int, bool]], cache: Cache, modality: str) -> None:
    """Write answers about the items of a cache, whole or not at all; earlier ones of the file are replaced."""
    by_name = {name: {str(row): shows for row, shows in rows.items()} for name, rows in answers.items() if rows}
    write_report_json(path, {"index_digest": cache.info.index_digest, "modality": modality, "answers": by_name})


def read_answers(path: AnyPath, cache: Cache, modality: str) -> Answers:
    """Read answers about the items of a cache; those about items that were removed since are left out.

    Raises:
        PathError: the file does not exist.
        CorruptError: it is no such file, or has changed since it was written.
        FingerprintError: the answers are about other samples.
        DataError: they are about items of another modality.
    """
    path = Path(path)
    if not path.is_file():
        raise PathError(f"answers: expected a file that the search page wrote, got {path}, which does not exist")
    values = read_report_json(path)
    digest, answered, answers = construct(
        path,
        lambda: (
            str(values["index_digest"]),
            str(values["modality"]),
            {
                str(name): {int(row): bool(shows) for row, shows in rows.items()}
                for name, rows in values["answers"].items()
            },
        ),
    )
    if not cache.info.has_rows_of(digest):
        raise FingerprintError(f"answers {path}: expected samples of {cache.path}, got others; answer anew")
    if answered != modality:
        raise DataError(f"answers {path}: expected answers about {noun(modality)}, got some about {noun(answered)}")
    is_removed = cache.removed_items(modality)
    return {
        name: {row: shows for row, shows in rows.items() if 0 <= row < len(is_removed) and not is_removed[row]}
        for name, rows in answers.items()
    }
