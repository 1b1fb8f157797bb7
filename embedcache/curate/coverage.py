"""Concept coverage: how many items of a cache show each concept of a list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.curate.counting import (
    SAMPLE,
    STRIP_SAMPLE,
    Background,
    CoverageCounter,
    PartialCoverage,
    estimate_background,
)
from embedcache.curate.prevalence import Estimate, estimate_counts, read_answers, settle, strip_weights
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.pairs import ANY_LANGUAGE
from embedcache.dataset.selections import read_selection
from embedcache.dataset.vectors import Vectors
from embedcache.errors import SettingError, pluralize
from embedcache.files import AnyPath
from embedcache.metrics.ranking import gini, top_fraction
from embedcache.modalities import count_items, noun
from embedcache.neighbors.knn import knn
from embedcache.neighbors.scan import scan
from embedcache.progress import AnyProgress, to_progress
from embedcache.runs import PAIR, Run
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
from embedcache.settings import merge_settings, replace_fields
from embedcache.store.cache import Cache

_NUM_NEAREST = 8  # concepts that each concept is compared with for overlap


@dataclass(frozen=True, kw_only=True)
class ConceptCounts:
    """Items of a pool, or of a selection of it, by concept.

    Args:
        name: name of the pool or the selection, as displayed.
        num_items: number of items.
        num_covered: items above the threshold of at least one concept.
        estimate: (C,) estimated items that show each concept, with 95% intervals; NaN if its scores cannot tell.
        prior: (C,) the estimates without answers, also for concepts whose scores cannot tell.
        above: (C,) items above each concept's threshold; an item counts for every concept that it is above.
        best: (C,) items by the concept they are most similar to.
        certain: (C,) these items, as far as they are near the concept's best ones.
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
class ConceptOverlap:
    """Two concepts, by number, that share items."""

    first: int
    second: int
    num_items: int  # above both thresholds
    jaccard: float  # these as a fraction of the items above at least one of the two
    cosine: float  # of the concepts' vectors


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
        overlaps: concepts that share items, sorted by number times Jaccard index; each is compared with the 8 nearest.
        strip_rows: (C, R) rows of items of all ranks, best first, about which a person can be asked.
        strip_weights: (R,) number of items of the pool that each of them stands for.
        answers: name of a concept -> row of an item -> whether it shows the concept, as a person said.
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
    overlaps: Sequence[ConceptOverlap]
    strip_rows: Ints
    strip_weights: Floats
    answers: Mapping[str, Mapping[int, bool]]

    def line(self) -> str:
        """Describe the measurement in one line."""
        run = "" if self.pool.run_path is None else f" projected by {self.pool.run_path.name}"
        fewest, most = int(self.concepts.counts.min()), int(self.concepts.counts.max())
        of = self.concepts.source["of"]
        each = f"{most:,} {of if most > 1 else of[:-1]}" if fewest == most else f"{fewest:,} to {most:,} {of}"
        texts = self.concepts.source.get("texts", [])[:2]
        such = f", such as {' and '.join(map(repr, texts))}" if texts else ""
        language = f" in {self.settings.language}" if self.settings.language not in (None, ANY_LANGUAGE) else ""
        return (
            f"{self.pool.cache.path.name}: {count_items(self.pool_counts.num_items, self.pool.modality)}{language}, "
            f"{self.pool.feature.name}{run}; {pluralize(len(self.concepts.names), 'concept')} of {each}{such}"
        )

    def warnings(self) -> list[str]:
        """Return what limits the estimates."""
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
    **options: Any,
) -> dict[str, CoverageReport]:
    """Measure coverage by each modality of the settings; see `measure_coverage`.

    These are, for `both`, the modalities of the run in its order, or images and texts without one.
    """
    settings = merge_settings(CoverageSettings, settings, options)
    progress = to_progress(progress)
    if settings.modality != "both":
        return {settings.modality: measure_coverage(cache, concepts, settings, progress=progress)}
    pair = ("image", "text") if settings.run is None else Run.open(settings.run, kind=PAIR).modalities
    reports = {}
    for modality in pair:
        options = {"modality": modality, "language": settings.language if modality == "text" else None}
        reports[modality] = measure_coverage(cache, concepts, settings, progress=progress, **options)
    return reports


def measure_coverage(
    cache: AnyPath,
    concepts: AnyPath,
    settings: CoverageSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> CoverageReport:
    """Estimate the items of each concept, in one pass over the vectors of a cache.

    What is counted, the best k and overlaps are exact, as each vector is multiplied with each concept's. Thresholds and
    the possible items of a concept come from 65,536 items drawn at random, or from all items. How a count is estimated:
    `embedcache.curate.prevalence`. Memory: the sample, C × (P + k) values, and per core a chunk, a tile of 8 MB of
    similarities, and a few values per position above a threshold.

    Args:
        cache: cache of the items.
        concepts: cache of prompts, or of labeled examples; see `open_concepts`.
        settings: modality, feature, answers, and what to keep.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: k above the number of items, or modality `both`.
        FingerprintError: concepts, items or answers are of different encoders or samples.
        UnknownNameError: there is no feature or column of that name.
        UnfinishedError: chunks of a feature are missing.
        DataError: a concept is repeated or empty, features cannot be compared, or a selection names other samples.
    """
    settings = merge_settings(CoverageSettings, settings, options)
    progress = to_progress(progress)
    if settings.feature is None and settings.run is None and settings.modality != "both":
        settings = replace_fields(
            settings, feature=choose_feature(cache, concepts, settings.modality, progress=progress)
        )
    pool = _open_pool(cache, settings)
    is_selected_N = _is_selected(pool, settings.selection)
    answers = {} if settings.answers is None else read_answers(settings.answers, pool.cache, pool.modality)
    opened = open_concepts(Cache(concepts), pool, label=settings.label)

    sample_rows = np.random.default_rng(0).permutation(pool.rows)[: max(SAMPLE, settings.k)]
    background = estimate_background(opened.vectors, _read_shuffled(pool, sample_rows), settings.k)
    num_concepts = len(opened.names)
    nearest, cosines = knn(
        opened.vectors, opened.vectors, min(_NUM_NEAREST, num_concepts - 1), own=np.arange(num_concepts)
    )
    counter = CoverageCounter(opened.vectors, background, nearest_CJ=nearest, k=settings.k, is_selected_N=is_selected_N)
    counted = scan(
        pool, counter.process, engine=settings.engine, address=settings.address, title="counting", progress=progress
    )
    partial = reduce(counter.merge, counted, counter.empty())
    pool_counts, *others = _concept_counts(partial, background, pool, settings.selection)
    report = CoverageReport(
        pool=pool,
        concepts=opened,
        settings=settings,
        background=background,
        thresholds=background.thresholds,
        pool_counts=pool_counts,
        selection_counts=others[0] if others else None,
        scores=partial.top.scores,
        rows=partial.top.numbers.astype(np.int64),
        nearest=nearest[:, 0] if nearest.shape[1] else np.full(len(nearest), -1),
        overlaps=_overlaps(pool_counts.above, partial.shared, nearest, cosines),
        strip_rows=sample_rows[background.strips],
        strip_weights=strip_weights(min(STRIP_SAMPLE, len(sample_rows)), len(pool.rows)),
        answers={name: answers[name] for name in opened.names if answers.get(name)},
    )
    return _settle_answered(report) if report.answers else report


def _read_shuffled(pool: Vectors, rows: Ints) -> Floats:
    """Read rows in their order, from the disk in that of the file: (S, P)."""
    order = np.argsort(rows)
    vectors_SP = np.empty((len(rows), pool.width), np.float32)
    vectors_SP[order] = pool.read(rows[order])
    return vectors_SP


def _settle_answered(report: CoverageReport) -> CoverageReport:
    """Return a report whose answered concepts have the counts, intervals and thresholds that the answers give."""
    thresholds_C, scale = report.thresholds.copy(), report.background.scale
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
        raise SettingError(
            f"k: expected 1 to {len(pool.rows)}, the number of {noun(pool.modality)} of {pool.cache.path} with "
            f"{pool.feature.name}, got {settings.k}"
        )
    return pool


def _is_selected(pool: Vectors, selection: Path | str | None) -> Bools | None:
    """Return whether each item of the cache is of a selected sample; None without a selection."""
    if selection is None:
        return None
    samples_N = pool.cache.items(pool.modality, columns=["sample"])["sample"].to_numpy()
    is_selected_N: Bools = np.isin(samples_N, read_selection(selection, [pool.cache]))
    return is_selected_N


def _concept_counts(
    partial: PartialCoverage, background: Background, pool: Vectors, selection: Path | str | None
) -> list[ConceptCounts]:
    """Return the counts of the pool and, if there is one, of the selection."""
    names = [f"all {noun(pool.modality)}", *([] if selection is None else [Path(selection).name])]
    possible_C = background.possible * (partial.num_items[0] / background.num_items)
    counts = []
    for group, name in enumerate(names):
        above_C, num_items = partial.above[group], int(partial.num_items[group])
        share_C = above_C / np.maximum(partial.above[0], 1)
        prior = estimate_counts(
            above_C, partial.assigned[group], partial.certain[group], possible_C * share_C, num_items
        )
        bounds = (prior.counts, prior.lows, prior.highs)
        told = [np.where(background.scale.separates, bound_C, np.nan) for bound_C in bounds]
        counts.append(
            ConceptCounts(
                name=name,
                num_items=num_items,
                num_covered=int(partial.num_covered[group]),
                estimate=Estimate(counts=told[0], lows=told[1], highs=told[2]),
                prior=prior,
                above=above_C,
                best=partial.best[group],
                certain=partial.certain[group],
            )
        )
    return counts


def _overlaps(counts_C: Ints, shared_CJ: Ints, nearest_CJ: Ints, cosines_CJ: Floats) -> list[ConceptOverlap]:
    """Return each pair of near concepts that share an item once, sorted by shared items times Jaccard index."""
    overlaps: dict[tuple[int, int], ConceptOverlap] = {}
    for first, rank in zip(*np.nonzero(shared_CJ), strict=True):
        second, num = int(nearest_CJ[first, rank]), int(shared_CJ[first, rank])
        pair = (min(int(first), second), max(int(first), second))
        jaccard = num / (int(counts_C[first] + counts_C[second]) - num)
        cosine = float(cosines_CJ[first, rank])
        overlaps[pair] = ConceptOverlap(first=pair[0], second=pair[1], num_items=num, jaccard=jaccard, cosine=cosine)
    return sorted(overlaps.values(), key=lambda pair: (-pair.jaccard * pair.num_items, pair.first, pair.second))
