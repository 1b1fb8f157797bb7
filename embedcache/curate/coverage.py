"""Concept coverage: how many items of a cache are near each concept of a list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import expm1, log1p
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.curate.counting import (
    SAMPLE,
    Background,
    CoverageCounter,
    PartialCoverage,
    count_indexed,
    estimate_background,
    open_index,
)
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.pairs import ANY_LANGUAGE
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SettingError, pluralize
from embedcache.files import AnyPath
from embedcache.metrics.classification import gini, top_fraction
from embedcache.metrics.neighbors import top_k
from embedcache.modalities import count_items, noun
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.saved import read_config
from embedcache.search.card import IndexCard
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
from embedcache.search.vectors import Vectors, run_pass
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache

_NUM_NEAREST = 8  # concepts that each concept is compared with for overlap


@dataclass(frozen=True, kw_only=True)
class ConceptCounts:
    """Items of a pool, or of a selection of it, near each concept.

    Args:
        name: name of the pool or the selection, as displayed.
        num_items: number of items.
        num_covered: items above the threshold of at least one concept.
        counts: (C,) items above each concept's threshold; an item counts for every concept that it is above.
        assigned: (C,) covered items by the concept they are most similar to, among those they are above.
    """

    name: str
    num_items: int
    num_covered: int
    counts: Ints
    assigned: Ints

    def gaps(self, min_count: int) -> Ints:
        """Return the concepts with fewer items, the emptiest first, of equal ones the first, as JSON lists them."""
        order: Ints = np.argsort(self.counts, kind="stable")
        return order[self.counts[order] < min_count]

    @property
    def gini(self) -> float:
        """Gini coefficient of the counts: 0 is even."""
        return gini(self.counts)

    def top_fraction(self, fraction: float) -> float:
        """Return the fraction of all matches in the largest concepts, such as the top 1%."""
        return top_fraction(self.counts, fraction)


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
        thresholds: (C,) float32.
        pool_counts: counts of the pool.
        selection_counts: counts of a selection, with the same thresholds.
        scores: (C, k) float32, similarities of the most similar items of the pool, best first.
        rows: (C, k) their rows; -1, with a similarity of -inf, where an index has found fewer.
        nearest: (C,) the nearest other concept; -1 if there is none.
        overlaps: concepts that share items, sorted by number times Jaccard index; each is compared with the 8 nearest.
        index: index that found the items; None if every item was compared.
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
    index: IndexCard | None = None

    def line(self) -> str:
        """Describe the measurement in one line."""
        run = "" if self.pool.run_path is None else f" projected by {self.pool.run_path.name}"
        fewest, most = int(self.concepts.counts.min()), int(self.concepts.counts.max())
        of = self.concepts.source["of"]
        each = f"{most:,} {of if most > 1 else of[:-1]}" if fewest == most else f"{fewest:,} to {most:,} {of}"
        if self.settings.threshold is None:
            bounds = f"{self.thresholds.min():.3f} to {self.thresholds.max():.3f}"
            rule = f"thresholds {self.settings.deviations:g} deviations above each background ({bounds})"
        else:
            rule = f"threshold {self.settings.threshold:g} for all"
        language = f" in {self.settings.language}" if self.settings.language not in (None, ANY_LANGUAGE) else ""
        return (
            f"{self.pool.cache.path.name}: {count_items(self.pool_counts.num_items, self.pool.modality)}{language}, "
            f"{self.pool.feature.name}{run}; {pluralize(len(self.concepts.names), 'concept')} of {each}; {rule}"
        )

    @property
    def expected_by_chance(self) -> float | None:
        """Items of the pool that a normal background puts above a calibrated threshold."""
        if self.settings.threshold is not None:
            return None
        return self.pool_counts.num_items * NormalDist().cdf(-self.settings.deviations)

    @property
    def covered_by_chance(self) -> float | None:
        """Items that normal, independent backgrounds put above the calibrated threshold of any of the concepts."""
        if self.expected_by_chance is None or not self.pool_counts.num_items:
            return None
        fraction = self.expected_by_chance / self.pool_counts.num_items
        return self.pool_counts.num_items * -expm1(len(self.concepts.names) * log1p(-fraction))

    def gaps(self) -> Ints:
        """Return the concepts with too few items in the last part, the emptiest first, of equal ones the nearest.

        The nearest is that whose most similar item is closest to its threshold, in units of the cosine.
        """
        part = self.all_counts[-1]
        order: Ints = np.lexsort((self.thresholds - self.scores[:, 0], part.counts))
        return order[part.counts[order] < self.settings.min_count]

    def warnings(self) -> list[str]:
        """Return reasons why the counts may be wrong."""
        warnings = []
        if self.index is not None:
            warnings.append(
                f"counted through an index, {self.index.factory}, whose measured recall@10 is "
                f"{self.index.recall_at_10:.3f}: a count may be too low, never too high"
            )
        by_chance = self.expected_by_chance
        if by_chance is not None and by_chance >= self.settings.min_count:
            warnings.append(
                f"WARNING: with a normal background, {by_chance:,.0f} of {self.pool_counts.num_items:,} items are "
                f"above a threshold by chance, and a concept needs only {self.settings.min_count:,} not to be a gap; "
                "raise --deviations"
            )
        num_low = int((self.thresholds <= self.background.quantiles[:, 0]).sum())
        if num_low:
            warnings.append(
                f"WARNING: for {num_low:,} of {len(self.thresholds):,} concepts at least half of the pool is above the "
                "threshold; raise --threshold"
            )
        num_high = int((self.thresholds >= 1).sum())
        if num_high:
            warnings.append(
                f"WARNING: for {num_high:,} of {len(self.thresholds):,} concepts no item can be above the threshold, "
                "which is 1 or more; lower --deviations, or give --threshold"
            )
        return warnings

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
    pair = ("image", "text") if settings.run is None else read_config(Path(settings.run)).modalities
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
    """Count the items above each concept's threshold in one pass over the vectors of a cache.

    Counts, the best k and overlaps are exact, as each vector is multiplied with each concept's; through an index they
    lack what it misses. Quantiles and calibrated thresholds come from 16,384 items drawn at random, or from all items.
    Memory: the sample, C × (P + k) values, and per core a chunk, a tile of 8 MB of similarities, and a few values per
    position above a threshold.

    Args:
        cache: cache of the items.
        concepts: cache of prompts, or of labeled examples; see `open_concepts`.
        settings: modality, feature, thresholds, and what to keep.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: k above the number of items, or modality `both`.
        FingerprintError: concepts, items or index are of different encoders.
        UnknownNameError: there is no feature or column of that name.
        UnfinishedError: chunks of a feature are missing.
        DataError: no item is above any threshold, or items are equal, by which none can be calibrated; a concept is
            repeated or empty, features cannot be compared, or a selection names other samples.
    """
    settings = merge_settings(CoverageSettings, settings, options)
    progress = to_progress(progress)
    if settings.feature is None and settings.run is None and settings.modality != "both":
        settings = replace(settings, feature=choose_feature(cache, concepts, settings.modality, progress=progress))
    pool = _open_pool(cache, settings)
    is_selected_N = _is_selected(pool, settings.selection)
    opened = open_concepts(Cache(concepts), pool, label=settings.label)
    background = estimate_background(opened.vectors, pool.sample(max(SAMPLE, settings.k)), settings.k)
    thresholds = _thresholds(background, pool, settings)
    nearest, cosines = top_k(
        opened.vectors, opened.vectors, min(_NUM_NEAREST, len(opened.names) - 1), exclude_self=True
    )
    counter = CoverageCounter(
        opened.vectors,
        thresholds_C=thresholds,
        floors_C=background.floors,
        nearest_CJ=nearest,
        k=settings.k,
        is_selected_N=is_selected_N,
    )
    partial, card = _count(pool, counter, opened.vectors, settings, progress)
    scores, rows = partial.top.table()
    _check_any_covered(partial, scores, thresholds, opened, pool)
    pool_counts, *others = _concept_counts(partial, pool, settings.selection)
    return CoverageReport(
        pool=pool,
        concepts=opened,
        settings=settings,
        background=background,
        thresholds=thresholds,
        pool_counts=pool_counts,
        selection_counts=others[0] if others else None,
        scores=scores,
        rows=rows,
        nearest=nearest[:, 0] if nearest.shape[1] else np.full(len(nearest), -1),
        overlaps=_overlaps(pool_counts.counts, partial.shared, nearest, cosines),
        index=card,
    )


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


def _thresholds(background: Background, pool: Vectors, settings: CoverageSettings) -> Floats:
    """Return the threshold of each concept: the given one, or calibrated by the background: (C,)."""
    calibrated_C = background.thresholds(settings.deviations)
    if settings.threshold is not None:
        return np.full_like(calibrated_C, settings.threshold)
    if not background.has_spread:
        raise DataError(
            f"threshold: expected {noun(pool.modality)} of {pool.cache.path} that differ, to calibrate thresholds by, "
            f"got {background.num_items:,} of about the same similarity to each concept; give a threshold"
        )
    return calibrated_C


def _is_selected(pool: Vectors, selection: Path | str | None) -> Bools | None:
    """Return whether each item of the cache is of a selected sample; None without a selection."""
    if selection is None:
        return None
    samples_N = pool.cache.items(pool.modality, columns=["sample"])["sample"].to_numpy()
    is_selected_N: Bools = np.isin(samples_N, read_selection(selection, [pool.cache]))
    return is_selected_N


def _count(
    pool: Vectors,
    counter: CoverageCounter,
    concepts_CP: Floats,
    settings: CoverageSettings,
    progress: Progress,
) -> tuple[PartialCoverage, IndexCard | None]:
    """Count all items, or those that an index finds; return the card of the index too."""
    if settings.index is None:
        partial = run_pass(
            pool, counter, engine=settings.engine, address=settings.address, title="counting", progress=progress
        )
        return partial, None
    index, card = open_index(settings.index, pool)
    return count_indexed(pool, counter, concepts_CP, index, card.search, progress), card


def _concept_counts(partial: PartialCoverage, pool: Vectors, selection: Path | str | None) -> list[ConceptCounts]:
    """Return the counts of the pool and, if there is one, of the selection."""
    names = [f"all {noun(pool.modality)}", *([] if selection is None else [Path(selection).name])]
    columns = zip(names, partial.num_items, partial.num_covered, partial.counts, partial.assigned, strict=True)
    return [
        ConceptCounts(name=name, num_items=int(items), num_covered=int(covered), counts=counts, assigned=assigned)
        for name, items, covered, counts, assigned in columns
    ]


def _check_any_covered(
    partial: PartialCoverage, scores_CK: Floats, thresholds_C: Floats, concepts: Concepts, pool: Vectors
) -> None:
    if partial.num_covered[0]:
        return
    closest = int(np.argmax(scores_CK[:, 0] - thresholds_C))
    raise DataError(
        f"none of {partial.num_items[0]:,} {noun(pool.modality)} of {pool.cache.path} is above the threshold of any of "
        f"{len(concepts.names):,} concepts; the closest is {concepts.names[closest]!r}: highest similarity "
        f"{scores_CK[closest, 0]:.3f}, threshold {thresholds_C[closest]:.3f}; the highest similarity of all is "
        f"{scores_CK[:, 0].max():.3f}; give a lower --threshold, or fewer --deviations"
    )


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
