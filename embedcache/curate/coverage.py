"""Concept coverage: how many items of a cache show each concept of a list, as estimates with intervals.

A cosine has no absolute meaning. The items of one concept begin at .3, the items of another at .6. The relative score
of an item is 0 at the median of the concept's similarities, which is background for any concept that most items do not
show. It is 1 at the concept's reach, the similarity of its typical best items. Items of the concept are expected in the
upper half. Without labels the real cut is unknown, so the interval spans the cuts that labeled collections had
(docs/about/results.md). A person's answers about some items narrow it.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from scipy.special import expit, log_expit
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.pairs import ANY_LANGUAGE
from embedcache.dataset.selections import read_selection
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, pluralize, summary
from embedcache.files import AnyPath
from embedcache.metrics import gini, top_fraction
from embedcache.modalities import count_items, noun
from embedcache.neighbors.knn import KBest, knn, scan
from embedcache.processes import num_cores
from embedcache.progress import AnyProgress, to_progress
from embedcache.provenance import construct, read_report_json, replacing_files, write_report_json
from embedcache.runs import PAIR, Run
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
from embedcache.settings import merge_settings, replace_fields, replace_flat
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import CoverageOptions

COUNTED = 0.55
"""Relative score above which items are counted."""
CERTAIN = 0.9
"""Relative score above which items almost certainly show the concept."""
POSSIBLE = 0.25
"""Relative score above which items may show the concept."""
STRIP_ITEMS = 24
SAMPLE = 65_536
"""Items drawn for the scale of each concept, which is exact if the pool has no more."""
STRIP_SAMPLE = 4_096
"""Items of the sample that are ranked to choose the items about which a person is asked."""

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
_TILE = 2_000_000  # similarities at a time: 8 MB per core; smaller tiles slow the product down
_MIN_TILE_ROWS = 64
_SCRATCH = threading.local()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Scale of the relative scores of C concepts.

    Args:
        medians: (C,) float32, cosine of the median item.
        spreads: (C,) float32, standard deviation of the background, measured below the median, where items of the
            concept do not widen it.
        reaches: (C,) float32, how far the best items are above the median, in spreads: the mean of the standardized
            scores z weighted by exp(3 z), which does not grow with the number of items. It is 3 for a normal
            background. It is averaged with the reach of all items except the best, so that a single exact match does
            not decide.
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
        """Return the cosine of each concept at a relative score: (C,). Up to 1, an item of the sample reaches it."""
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
    low_C = partitioned_CS[:, ranks[0]]
    medians_C = partitioned_CS[:, ranks[1]]
    spreads_C = np.maximum(medians_C - low_C, np.float32(_MIN_SPREAD))

    standardized_CS = (sims_CS - medians_C[:, None]) / spreads_C[:, None]
    reaches_C: Floats = _tilted_mean(standardized_CS)

    # The best item is left out of the second mean, or a single exact match would decide the reach.
    standardized_CS[np.arange(len(reaches_C)), standardized_CS.argmax(axis=1)] = -np.inf
    if sims_CS.shape[1] > 1:
        reaches_C = (reaches_C + _tilted_mean(standardized_CS)) / np.float32(2)
    return Scale(medians=medians_C, spreads=spreads_C, reaches=reaches_C)


def _tilted_mean(standardized_CS: Floats) -> Floats:
    """Return the mean of the scores of each concept, weighted by exp(3 z): (C,)."""
    # Weights relative to the best score do not overflow.
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
        strips: (C, M) int64, positions in the sample of items of all ranks, best first.
        strip_cosines: (C, M) float32, their similarities.
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
    ranks_M = strip_ranks(min(STRIP_SAMPLE, len(sample_SP)))

    def compare(block: slice) -> Iterator[Array]:
        sims_BS = concepts_CP[block] @ sample_SP.T
        scale = measure_scale(sims_BS)
        yield from (scale.medians, scale.spreads, scale.reaches)
        yield (sims_BS > scale.cosines(POSSIBLE)[:, None]).sum(axis=1)
        yield np.partition(sims_BS, -k, axis=1)[:, -k] - np.float32(_ROUNDING)
        strips = np.argsort(-sims_BS[:, :STRIP_SAMPLE], axis=1, kind="stable")[:, ranks_M]
        yield from (strips, np.take_along_axis(sims_BS, strips, axis=1))

    # Blocks run on all cores, so each product uses one thread.
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
    """Estimated numbers of items of C concepts, with 95% intervals. They are NaN if the scores cannot tell.

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

    A counted item may belong to a related concept. An item that another concept fits better may belong to both, as
    birds are animals. So the estimate is the geometric mean of two counts: all counted items, and the counted items
    whose best concept it is. The interval reaches from the certain items to the possible ones.

    Args:
        above_C: items above `COUNTED`.
        assigned_C: items above `COUNTED` whose best concept it is.
        certain_C: items above `CERTAIN` whose best concept it is.
        possible_C: items above `POSSIBLE`.
        num_items: number of all items.
    """
    counts_C = np.sqrt(np.maximum(above_C, 1) * np.maximum(assigned_C, 1))
    highs_C = np.clip(_SAMPLING * possible_C, counts_C, num_items)
    return Estimate(counts=np.minimum(counts_C, highs_C), lows=certain_C / _SAMPLING, highs=highs_C)


def strip_ranks(num_sampled: int) -> Array:
    """Return the ranks, from 0, of the items about which a person is asked. Their logarithms are evenly spaced."""
    ranks = np.unique(np.geomspace(1, num_sampled, 4 * STRIP_ITEMS).round().astype(np.int64)) - 1
    chosen = np.linspace(0, len(ranks) - 1, min(STRIP_ITEMS, len(ranks))).round().astype(np.int64)
    picked: Array = ranks[chosen]
    return picked


def strip_weights(num_sampled: int, num_items: int) -> Array:
    """Return how many of N items each item of the strip stands for. The sum is N."""
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
        strip_scores: (M,) relative scores of items of all ranks.
        strip_weights: (M,) number of items that each of them stands for.
        answered_scores: (A,) relative scores of the items that were answered.
        answers: (A,) whether each shows the concept.
    """
    count, low, high = prior

    # The count that each cut and width of the curve implies.
    probabilities_HWM = expit((strip_scores - _CUTS[:, None, None]) / _WIDTHS[:, None])
    counts_HW = np.maximum(probabilities_HWM @ strip_weights, 0.5)

    # The change of variables makes the prior one of the count, and not of the cut.
    spread = max(np.log(high / max(low, 0.5)) / 4, _MIN_SPREAD_OF_LOG)
    density_HW = np.abs(np.gradient(np.log(counts_HW), axis=0)) + 1e-12
    log_posterior_HW = np.log(density_HW) - 0.5 * ((np.log(counts_HW) - np.log(count)) / spread) ** 2

    signs_A = np.where(np.asarray(answers, bool), 1.0, -1.0)
    logits_HWA = (answered_scores - _CUTS[:, None, None]) / _WIDTHS[:, None]
    log_posterior_HW = log_posterior_HW + log_expit(signs_A * logits_HWA).sum(axis=-1)
    posterior_HW = np.exp(log_posterior_HW - log_posterior_HW.max())
    posterior_HW /= posterior_HW.sum()

    # Median and 95% interval of the count; it cannot be below the confirmed items.
    order = np.argsort(counts_HW, axis=None)
    cumulated = np.cumsum(posterior_HW.ravel()[order])
    places = np.searchsorted(cumulated, [0.5, 0.025, 0.975]).clip(max=len(order) - 1)
    num_confirmed = float((signs_A > 0).sum())
    settled, lowest, highest = np.maximum(counts_HW.ravel()[order][places], num_confirmed)
    cut = posterior_HW.sum(axis=1) @ _CUTS
    return Settled(count=float(settled), low=float(lowest), high=float(highest), cut=float(cut))


Answers = dict[str, dict[int, bool]]
"""Name of a concept -> row of an item -> whether it shows the concept."""


def answers_path(report: Path) -> Path:
    """Return where the answers about a report are saved: `coverage.json` -> `coverage.answers.json`."""
    return report.with_name(f"{report.name.removesuffix('.json')}.answers.json")


def write_answers(path: Path, answers: Mapping[str, Mapping[int, bool]], cache: Cache, modality: str) -> None:
    """Write answers about the items of a cache, whole or not at all. They replace the earlier answers of the file."""
    by_name = {}
    for name, rows in answers.items():
        if rows:
            by_name[name] = {str(row): shows for row, shows in rows.items()}
    with replacing_files(is_allowed=True):  # --overwrite is about files that a user names
        write_report_json(path, {"index_digest": cache.info.index_digest, "modality": modality, "answers": by_name})


def read_answers(path: AnyPath, cache: Cache, modality: str) -> Answers:
    """Read answers about the items of a cache. Answers about items that were removed since are left out.

    Raises:
        PathError: the file does not exist.
        CorruptError: it is not a file of answers, or has changed since it was written.
        FingerprintError: the answers are about other samples.
        DataError: they are about items of another modality.
    """
    path = Path(path)
    if not path.is_file():
        raise PathError(f"answers: expected a file that the search page wrote, got {path}, which does not exist")
    digest, answered, answers = construct(path, partial(_parse_answers, read_report_json(path)))

    if not cache.info.has_rows_of(digest):
        raise FingerprintError(f"answers {path}: expected samples of {cache.path}, got others; answer anew")
    if answered != modality:
        raise DataError(f"answers {path}: expected answers about {noun(modality)}, got some about {noun(answered)}")

    is_removed = cache.removed_items(modality)
    present: Answers = {}
    for name, rows in answers.items():
        present[name] = {
            row: shows for row, shows in rows.items() if 0 <= row < len(is_removed) and not is_removed[row]
        }
    return present


def _parse_answers(values: Mapping[str, Any]) -> tuple[str, str, Answers]:
    """Return the digest, the modality and the answers of a file's values."""
    answers: Answers = {}
    for name, rows in values["answers"].items():
        answers[str(name)] = {int(row): bool(shows) for row, shows in rows.items()}
    return str(values["index_digest"]), str(values["modality"]), answers


@dataclass(frozen=True, kw_only=True)
class ConceptCounts:
    """Items of a pool, or of a selection of it, by concept.

    Args:
        name: name of the pool or the selection, as displayed.
        num_items: number of items.
        num_covered: items above the threshold of at least one concept.
        estimate: (C,) estimated items that show each concept, with 95% intervals; NaN if its scores cannot tell.
        prior: (C,) the estimates without answers, also for concepts whose scores cannot tell.
        above: (C,) items above each concept's threshold; an item counts for every concept whose threshold it exceeds.
        best: (C,) items by the concept they are most similar to.
        certain: (C,) items of `best` that are near the concept's best ones.

    Example:
        >>> counts = embedcache.measure_coverage("cache", "names.txt", modality="text").pool_counts
        >>> counts.num_items, bool(counts.above[0] >= 50)  # 50 of the captions are of zebras
        (600, True)
    """

    name: str
    num_items: int
    num_covered: int
    estimate: Estimate
    prior: Estimate
    above: Ints
    best: Ints
    certain: Ints

    @property
    def can_tell(self) -> Bools:
        """Whether there is an estimate for each concept: (C,)."""
        return ~np.isnan(self.estimate.counts)

    def gaps(self, min_count: int) -> Ints:
        """Return the concepts that have fewer items even by their upper bounds, the emptiest first."""
        order: Ints = np.lexsort((self.above, self.estimate.counts))
        return order[self.estimate.highs[order] < min_count]

    @property
    def gini(self) -> float:
        """Gini coefficient of the estimated counts: 0 is even."""
        return gini(self.estimate.counts[self.can_tell])

    def top_fraction(self, fraction: float) -> float:
        """Return the fraction of all estimated counts in the largest concepts, such as the top 1%."""
        return top_fraction(self.estimate.counts[self.can_tell], fraction)


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """Coverage of a list of concepts by a pool of items.

    Args:
        pool: the items.
        concepts: the concepts.
        settings: settings of the measurement.
        background: similarities of each concept on a random sample of the pool.
        thresholds: (C,) float32, cosine above which an item is marked; a concept's best item is not below.
        pool_counts: counts of the pool.
        selection_counts: counts of a selection, with the same thresholds.
        scores: (C, k) float32, similarities of the most similar items of the pool, best first.
        rows: (C, k) their rows.
        nearest: (C,) the nearest other concept; -1 if there is none.
        strip_rows: (C, M) rows of items of all ranks, best first, about which a person can be asked.
        strip_weights: (M,) number of items of the pool that each of them stands for.
        answers: name of a concept -> row of an item -> whether it shows the concept, as a person said.

    Example:
        >>> report = embedcache.measure_coverage("cache", "names.txt", modality="text", k=5)
        >>> report.concepts.names[0], report.rows[0].tolist()  # the five most similar items
        ('zebra', [0, 1, 2, 3, 4])
    """

    pool: Vectors
    concepts: Concepts
    settings: CoverageSettings
    background: Background
    thresholds: Floats
    pool_counts: ConceptCounts
    selection_counts: ConceptCounts | None
    scores: Floats
    rows: Ints
    nearest: Ints
    strip_rows: Ints
    strip_weights: Floats
    answers: Mapping[str, Mapping[int, bool]]

    __repr__ = summary

    def line(self) -> str:
        """Describe the measurement in one line."""
        run = "" if self.pool.run_path is None else f" projected by {self.pool.run_path.name}"
        language = f" in {self.settings.language}" if self.settings.language not in (None, ANY_LANGUAGE) else ""

        fewest = int(self.concepts.counts.min())
        highest = int(self.concepts.counts.max())
        unit = self.concepts.source["of"]
        if fewest == highest:
            size = f"{highest:,} {unit if highest > 1 else unit[:-1]}"
        else:
            size = f"{fewest:,} to {highest:,} {unit}"

        texts = self.concepts.source.get("texts", [])[:2]
        examples = f", such as {' and '.join(map(repr, texts))}" if texts else ""
        return (
            f"{self.pool.cache.path.name}: {count_items(self.pool_counts.num_items, self.pool.modality)}{language}, "
            f"{self.pool.feature.name}{run}; {pluralize(len(self.concepts.names), 'concept')} of {size}{examples}"
        )

    def warnings(self) -> list[str]:
        """Return the warnings about the estimates."""
        num_untold = int((~self.pool_counts.can_tell).sum())
        if not num_untold:
            return []
        return [
            f"for {num_untold:,} of {len(self.concepts.names):,} concepts the scores cannot tell, as none of "
            f"{self.background.num_items:,} {noun(self.pool.modality)} stands out from the others; look at their best "
            "items, and answer for some on the page of embedcache serve"
        ]

    @property
    def all_counts(self) -> list[ConceptCounts]:
        """Counts of the pool, and of the selection if there is one."""
        return [self.pool_counts] if self.selection_counts is None else [self.pool_counts, self.selection_counts]


def measure_coverage_by_modality(
    cache: AnyPath,
    concepts: AnyPath,
    settings: CoverageSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["CoverageOptions"],
) -> dict[str, CoverageReport]:
    """Measure coverage by each modality of the settings. See `measure_coverage`.

    `both` means the two modalities of the run in its order, or images and texts if there is no run.

    Example:
        >>> list(embedcache.measure_coverage_by_modality("cache", "names.txt", modality="text"))
        ['text']
    """
    settings = merge_settings(CoverageSettings, settings, options)
    progress = to_progress(progress)
    if settings.modality != "both":
        return {settings.modality: measure_coverage(cache, concepts, settings, progress=progress)}

    pair = ("image", "text") if settings.run is None else Run.open(settings.run, kind=PAIR).modalities
    reports = {}
    for modality in pair:
        language = settings.language if modality == "text" else None
        modality_settings = replace_flat(settings, {"modality": modality, "language": language})
        reports[modality] = measure_coverage(cache, concepts, modality_settings, progress=progress)
    return reports


def measure_coverage(
    cache: AnyPath,
    concepts: AnyPath,
    settings: CoverageSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["CoverageOptions"],
) -> CoverageReport:
    """Estimate the items of each concept, in one pass over the vectors of a cache.

    Counts above a threshold and the best k items are exact, as each vector is multiplied with each concept's vector.
    Thresholds and the possible items of a concept come from 65,536 items drawn at random, or from all items if there
    are no more. `estimate_counts` says how a count is estimated. Memory: the sample, C × (P + k) values, and per core a
    chunk, a tile of 8 MB of similarities, and a few values per position above a threshold.

    Args:
        cache: cache of the items.
        concepts: cache of prompts or of labeled examples, or a `.txt` of names; see `open_concepts`.
        settings: modality, feature, answers, and what to keep.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: k above the number of items, or modality `both`.
        FingerprintError: concepts, items or answers are of different encoders or samples.
        UnknownNameError: there is no feature or column of that name.
        UnfinishedError: chunks of a feature are missing.
        DataError: a concept is repeated or empty, features cannot be compared, or a selection names other samples.

    Example:
        >>> report = embedcache.measure_coverage("cache", "names.txt", modality="text")
        >>> report.concepts.names, report.pool_counts.num_items
        (['zebra', 'yak', 'gnu'], 600)
    """
    settings = merge_settings(CoverageSettings, settings, options)
    progress = to_progress(progress)
    if settings.feature is None and settings.run is None and settings.modality != "both":
        settings = replace_fields(
            settings, feature=choose_feature(cache, concepts, settings.modality, progress=progress)
        )

    pool = _open_pool(cache, settings)
    is_selected_N = None
    if settings.selection is not None:
        samples_N = pool.cache.items(pool.modality, columns=["sample"])["sample"].to_numpy()
        is_selected_N = np.isin(samples_N, read_selection(settings.selection, [pool.cache]))
    answers = {} if settings.answers is None else read_answers(settings.answers, pool.cache, pool.modality)
    opened = open_concepts(concepts, pool, label=settings.label, progress=progress)

    # The scale of each concept comes from a random sample, before the exact pass over all items.
    sample_rows = np.random.default_rng(0).permutation(pool.rows)[: max(SAMPLE, settings.k)]
    background = estimate_background(opened.vectors, _read_shuffled(pool, sample_rows), settings.k)
    counter = CoverageCounter(opened.vectors, background, k=settings.k, is_selected_N=is_selected_N)
    counted = scan(
        pool, counter.process, engine=settings.engine, address=settings.address, title="counting", progress=progress
    )
    total = reduce(counter.merge, counted, counter.empty())
    pool_counts, *selection_counts = _concept_counts(total, background, pool, settings.selection)
    nearest, _ = knn(opened.vectors, opened.vectors, 1, own=np.arange(len(opened.names)))

    report = CoverageReport(
        pool=pool,
        concepts=opened,
        settings=settings,
        background=background,
        thresholds=background.thresholds,
        pool_counts=pool_counts,
        selection_counts=selection_counts[0] if selection_counts else None,
        scores=total.top.scores,
        rows=total.top.numbers.astype(np.int64),
        nearest=nearest[:, 0],
        strip_rows=sample_rows[background.strips],
        strip_weights=strip_weights(min(STRIP_SAMPLE, len(sample_rows)), len(pool.rows)),
        answers={name: answers[name] for name in opened.names if answers.get(name)},
    )
    return _settle_answered(report) if report.answers else report


def _read_shuffled(pool: Vectors, rows: Ints) -> Floats:
    """Read rows, (S, P), in their order. The disk is read in the order of the file, which is faster."""
    order = np.argsort(rows)
    vectors_SP = np.empty((len(rows), pool.width), np.float32)
    vectors_SP[order] = pool.read(rows[order])
    return vectors_SP


def _settle_answered(report: CoverageReport) -> CoverageReport:
    """Return a report whose answered concepts have the counts, intervals and thresholds that the answers give."""
    thresholds_C = report.thresholds.copy()
    scale = report.background.scale
    for name, answered in report.answers.items():
        number = report.concepts.names.index(name)
        cosines = report.pool.read(np.array(list(answered), np.int64)) @ report.concepts.vectors[number]
        prior = report.pool_counts.prior
        settled = settle(
            (prior.counts[number], prior.lows[number], prior.highs[number]),
            scale.scores(number, report.background.strip_cosines[number]),
            report.strip_weights,
            scale.scores(number, cosines),
            list(answered.values()),
        )
        thresholds_C[number] = min(scale.cosines(settled.cut)[number], report.scores[number, 0])

        # Answers are about the whole pool; a selection's estimate changes in proportion.
        for part in report.all_counts:
            ratio = part.prior.counts[number] / prior.counts[number]
            part.estimate.counts[number] = min(ratio * settled.count, part.num_items)
            part.estimate.lows[number] = min(ratio * settled.low, part.num_items)
            part.estimate.highs[number] = min(ratio * settled.high, part.num_items)
    return replace(report, thresholds=thresholds_C)


def _open_pool(cache_path: AnyPath, settings: CoverageSettings) -> Vectors:
    """Open the vectors of the items, and check the settings that depend on them."""
    if settings.modality == "both":
        raise SettingError("modality: expected one, got both; use measure_coverage_by_modality for both")

    pool = Vectors(
        cache_path,
        settings.modality,
        settings.feature,
        settings.run,
        settings.language,
        device=settings.device,
    )
    if settings.k > len(pool.rows):
        raise SettingError(f"k: expected at most the {len(pool.rows)} {noun(pool.modality)}, got {settings.k}")
    return pool


def _concept_counts(
    total: "PartialCoverage", background: Background, pool: Vectors, selection: Path | str | None
) -> list[ConceptCounts]:
    """Return the counts of the pool and, if there is one, of the selection."""
    names = [f"all {noun(pool.modality)}", *([] if selection is None else [Path(selection).name])]
    possible_C = background.possible * (total.num_items[0] / background.num_items)

    counts = []
    for group, name in enumerate(names):
        above_C = total.above[group]
        num_items = int(total.num_items[group])

        # Possible items are known of the pool's sample; a selection gets its share of the counted ones.
        share_C = above_C / np.maximum(total.above[0], 1)
        prior = estimate_counts(above_C, total.assigned[group], total.certain[group], possible_C * share_C, num_items)
        bounds = (prior.counts, prior.lows, prior.highs)
        masked = [np.where(background.scale.separates, bound_C, np.nan) for bound_C in bounds]
        counts.append(
            ConceptCounts(
                name=name,
                num_items=num_items,
                num_covered=int(total.num_covered[group]),
                estimate=Estimate(counts=masked[0], lows=masked[1], highs=masked[2]),
                prior=prior,
                above=above_C,
                best=total.best[group],
                certain=total.certain[group],
            )
        )
    return counts


@dataclass(kw_only=True)
class PartialCoverage:
    """Counts of a range of chunks. G is 1, or 2 if a selection is counted in addition to the pool."""

    num_items: Ints  # (G,)
    num_covered: Ints  # (G,) items above the threshold of at least one concept
    above: Ints  # (G, C) items above each concept's threshold
    best: Ints  # (G, C) items by the concept they are most similar to
    assigned: Ints  # (G, C) items of `best` that are above the concept's threshold
    certain: Ints  # (G, C) items of `best` that are almost certain
    top: KBest  # the most similar items of each concept


class CoverageCounter:
    """Count the items near each concept in an exact pass over a pool.

    A tile of similarities costs one matrix product, one comparison and one search for the best concept of each item.
    Everything else works on the few values above a threshold or possibly among the k best. Memory: a chunk, a tile,
    C × k numbers, and the positions above a threshold.

    Args:
        concepts_CP: rows of length 1.
        background: thresholds of the concepts.
        k: items to keep per concept.
        is_selected_N: whether each row of the pool's modality is selected, None without a selection.
    """

    def __init__(
        self,
        concepts_CP: Floats,
        background: Background,
        *,
        k: int,
        is_selected_N: Bools | None = None,
    ) -> None:
        self._columns_PC = np.ascontiguousarray(concepts_CP.T)
        self._background = background
        self._lower_C = np.minimum(background.thresholds, background.floors)
        self._k = k
        self._is_selected_N = is_selected_N

    def process(self, rows_B: Ints, vectors_BP: Floats) -> PartialCoverage:
        """Count a chunk."""
        counts = self.empty()
        counts.num_items = np.array([mask.sum() for mask in self._group_masks(rows_B)])

        # Tiles of about equal size, as a small last one would waste its product.
        num_rows = max(1, len(rows_B))
        num_concepts = len(self._lower_C)
        num_tiles = -(-num_rows // max(_MIN_TILE_ROWS, _TILE // num_concepts))
        size = -(-num_rows // num_tiles)
        sims, mask = _scratch_arrays(size, num_concepts)

        for tile in blocks(len(rows_B), size):
            sims_BC = sims[: tile.stop - tile.start]
            mask_BC = mask[: tile.stop - tile.start]
            np.matmul(vectors_BP[tile], self._columns_PC, out=sims_BC)
            self._count_best(counts, rows_B[tile], sims_BC)

            # Few similarities pass, so the rest of the tile is not touched again.
            np.greater_equal(sims_BC, self._lower_C, out=mask_BC)
            positions = np.flatnonzero(mask_BC)
            items, concepts = np.divmod(positions, num_concepts)
            self._count_above(counts, rows_B[tile][items], concepts, sims_BC.ravel()[positions])
        return counts

    def merge(self, total: PartialCoverage, part: PartialCoverage) -> PartialCoverage:
        """Add the second to the first."""
        for field in fields(PartialCoverage):
            if field.name != "top":
                setattr(total, field.name, getattr(total, field.name) + getattr(part, field.name))
        concepts, ranks = np.nonzero(part.top.numbers >= 0)
        total.top.add(concepts, part.top.numbers[concepts, ranks], part.top.scores[concepts, ranks])
        return total

    def empty(self) -> PartialCoverage:
        """Return counts of zero, into which others may be merged."""
        num_groups = 1 if self._is_selected_N is None else 2
        num_concepts = len(self._lower_C)
        above, best, assigned, certain = np.zeros((4, num_groups, num_concepts), np.int64)
        return PartialCoverage(
            num_items=np.zeros(num_groups, np.int64),
            num_covered=np.zeros(num_groups, np.int64),
            above=above,
            best=best,
            assigned=assigned,
            certain=certain,
            top=KBest(num_concepts, self._k),
        )

    def _count_best(self, counts: PartialCoverage, rows_B: Ints, sims_BC: Floats) -> None:
        """Count the items of a tile by the concept they are most similar to. Ties go to the first concept."""
        concepts_B = sims_BC.argmax(axis=1)
        scores_B = sims_BC[np.arange(len(concepts_B)), concepts_B]
        is_above_B = scores_B > self._background.thresholds[concepts_B]
        is_certain_B = scores_B > self._background.certain[concepts_B]
        for group, mask_B in enumerate(self._group_masks(rows_B)):
            counts.best[group] += self._count_concepts(concepts_B[mask_B])
            counts.assigned[group] += self._count_concepts(concepts_B[mask_B & is_above_B])
            counts.certain[group] += self._count_concepts(concepts_B[mask_B & is_certain_B])

    def _count_above(self, counts: PartialCoverage, rows_M: Ints, concepts_M: Ints, scores_M: Floats) -> None:
        """Count all matches of some items that are not below `_lower_C`, sorted by row and concept."""
        is_candidate = scores_M >= self._background.floors[concepts_M]
        counts.top.add(concepts_M[is_candidate], rows_M[is_candidate], scores_M[is_candidate])

        is_above = scores_M > self._background.thresholds[concepts_M]
        rows_A = rows_M[is_above]
        concepts_A = concepts_M[is_above]
        for group, mask_A in enumerate(self._group_masks(rows_A)):
            counts.num_covered[group] += np.count_nonzero(np.diff(rows_A[mask_A], prepend=-1))
            counts.above[group] += self._count_concepts(concepts_A[mask_A])

    def _count_concepts(self, concepts: Ints) -> Ints:
        return np.bincount(concepts, minlength=len(self._lower_C))

    def _group_masks(self, rows: Ints) -> list[Bools]:
        """Return whether each row is in the pool and, if there is a selection, whether it is selected."""
        everything = np.ones(len(rows), bool)
        return [everything] if self._is_selected_N is None else [everything, self._is_selected_N[rows]]


def _scratch_arrays(num_rows: int, num_concepts: int) -> tuple[Floats, Bools]:
    """Return arrays that a thread keeps from tile to tile. New arrays would cost a page fault per page."""
    arrays: tuple[Floats, Bools] | None = getattr(_SCRATCH, "arrays", None)
    if arrays is None or len(arrays[0]) < num_rows or arrays[0].shape[1] != num_concepts:
        shape = (num_rows, num_concepts)
        arrays = (np.empty(shape, np.float32), np.empty(shape, bool))
        _SCRATCH.arrays = arrays
    return arrays
