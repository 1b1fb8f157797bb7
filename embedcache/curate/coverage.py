"""Concept coverage: how many items of a cache show each concept of a list."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, blocks
from embedcache.curate.prevalence import (
    SAMPLE,
    STRIP_SAMPLE,
    Background,
    Estimate,
    estimate_background,
    estimate_counts,
    read_answers,
    settle,
    strip_weights,
)
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.pairs import ANY_LANGUAGE
from embedcache.dataset.selections import read_selection
from embedcache.dataset.vectors import Vectors
from embedcache.errors import SettingError, pluralize
from embedcache.files import AnyPath
from embedcache.metrics.ranking import gini, top_fraction
from embedcache.modalities import count_items, noun
from embedcache.neighbors.knn import KBest, knn
from embedcache.neighbors.scan import scan
from embedcache.progress import AnyProgress, to_progress
from embedcache.runs import PAIR, Run
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
from embedcache.settings import merge_settings, replace_fields, replace_flat
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import CoverageOptions

_TILE = 2_000_000  # similarities at a time: 8 MB per core; smaller tiles slow the product down
_MIN_TILE_ROWS = 64
_SCRATCH = threading.local()


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
    **options: Unpack["CoverageOptions"],
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
        language = settings.language if modality == "text" else None
        of_modality = replace_flat(settings, {"modality": modality, "language": language})
        reports[modality] = measure_coverage(cache, concepts, of_modality, progress=progress)
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

    What is counted, and the best k are exact, as each vector is multiplied with each concept's. Thresholds and
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
    counter = CoverageCounter(opened.vectors, background, k=settings.k, is_selected_N=is_selected_N)
    counted = scan(
        pool, counter.process, engine=settings.engine, address=settings.address, title="counting", progress=progress
    )
    partial = reduce(counter.merge, counted, counter.empty())
    pool_counts, *selection_counts = _concept_counts(partial, background, pool, settings.selection)
    nearest, _ = knn(opened.vectors, opened.vectors, 1, own=np.arange(len(opened.names)))
    report = CoverageReport(
        pool=pool,
        concepts=opened,
        settings=settings,
        background=background,
        thresholds=background.thresholds,
        pool_counts=pool_counts,
        selection_counts=selection_counts[0] if selection_counts else None,
        scores=partial.top.scores,
        rows=partial.top.numbers.astype(np.int64),
        nearest=nearest[:, 0],
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
    partial: "PartialCoverage", background: Background, pool: Vectors, selection: Path | str | None
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


@dataclass(kw_only=True)
class PartialCoverage:
    """Counts of a range of chunks. G is 1, or 2 if a selection is counted beside the whole pool."""

    num_items: Ints  # (G,)
    num_covered: Ints  # (G,) items above the threshold of at least one concept
    above: Ints  # (G, C) items above each concept's threshold
    best: Ints  # (G, C) items by the concept they are most similar to
    assigned: Ints  # (G, C) these items, as far as they are above its threshold
    certain: Ints  # (G, C) these items, as far as they are almost certain
    top: KBest  # the most similar items of each concept


class CoverageCounter:
    """The computation of an exact pass over a pool, which counts the items near each concept.

    A tile of similarities is one matrix product, one comparison and one search for the best concept of each item; all
    else works on the few values above a threshold or possibly among the k best. Memory: a chunk, a tile, C × k
    numbers, and the positions above a threshold.

    Args:
        concepts_CP: rows of length 1.
        background: thresholds of the concepts.
        k: items to keep per concept.
        is_selected_N: whether each row of the pool's modality is selected; None: no selection.
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
        partial = self.empty()
        partial.num_items = np.array([mask.sum() for mask in self._group_masks(rows_B)])
        num_rows, num_concepts = max(1, len(rows_B)), len(self._lower_C)
        num_tiles = -(-num_rows // max(_MIN_TILE_ROWS, _TILE // num_concepts))
        size = -(-num_rows // num_tiles)  # tiles of about equal size
        sims, mask = _scratch_arrays(size, num_concepts)

        for tile in blocks(len(rows_B), size):
            sims_BC, mask_BC = sims[: tile.stop - tile.start], mask[: tile.stop - tile.start]
            np.matmul(vectors_BP[tile], self._columns_PC, out=sims_BC)
            self._count_best(partial, rows_B[tile], sims_BC)

            np.greater_equal(sims_BC, self._lower_C, out=mask_BC)
            positions = np.flatnonzero(mask_BC)
            items, concepts = np.divmod(positions, num_concepts)
            self._count_above(partial, rows_B[tile][items], concepts, sims_BC.ravel()[positions])
        return partial

    def merge(self, before: PartialCoverage, after: PartialCoverage) -> PartialCoverage:
        """Add the second to the first."""
        for field in fields(PartialCoverage):
            if field.name != "top":
                setattr(before, field.name, getattr(before, field.name) + getattr(after, field.name))
        concepts, ranks = np.nonzero(after.top.numbers >= 0)
        before.top.add(concepts, after.top.numbers[concepts, ranks], after.top.scores[concepts, ranks])
        return before

    def empty(self) -> PartialCoverage:
        """Return counts of nothing, into which others may be merged."""
        num_groups, num_concepts = 1 if self._is_selected_N is None else 2, len(self._lower_C)
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

    def _count_best(self, partial: PartialCoverage, rows_B: Ints, sims_BC: Floats) -> None:
        """Count the items of a tile by the concept they are most similar to; of equal ones the first."""
        concepts_B = sims_BC.argmax(axis=1)
        scores_B = sims_BC[np.arange(len(concepts_B)), concepts_B]
        is_above_B = scores_B > self._background.thresholds[concepts_B]
        is_certain_B = scores_B > self._background.certain[concepts_B]
        for group, mask_B in enumerate(self._group_masks(rows_B)):
            partial.best[group] += self._count_concepts(concepts_B[mask_B])
            partial.assigned[group] += self._count_concepts(concepts_B[mask_B & is_above_B])
            partial.certain[group] += self._count_concepts(concepts_B[mask_B & is_certain_B])

    def _count_above(self, partial: PartialCoverage, rows_M: Ints, concepts_M: Ints, scores_M: Floats) -> None:
        """Count matches: all those of an item, sorted by row and concept, that are not below `_lower_C`."""
        is_candidate = scores_M >= self._background.floors[concepts_M]
        partial.top.add(concepts_M[is_candidate], rows_M[is_candidate], scores_M[is_candidate])

        is_above = scores_M > self._background.thresholds[concepts_M]
        rows_A, concepts_A = rows_M[is_above], concepts_M[is_above]
        for group, mask_A in enumerate(self._group_masks(rows_A)):
            partial.num_covered[group] += np.count_nonzero(np.diff(rows_A[mask_A], prepend=-1))
            partial.above[group] += self._count_concepts(concepts_A[mask_A])

    def _count_concepts(self, concepts: Ints) -> Ints:
        return np.bincount(concepts, minlength=len(self._lower_C))

    def _group_masks(self, rows: Ints) -> list[Bools]:
        """Return which rows are in the pool, and which in the selection."""
        everything = np.ones(len(rows), bool)
        return [everything] if self._is_selected_N is None else [everything, self._is_selected_N[rows]]


def _scratch_arrays(num_rows: int, num_concepts: int) -> tuple[Floats, Bools]:
    """Return arrays that a thread keeps from tile to tile; new ones would come from the system page by page."""
    arrays: tuple[Floats, Bools] | None = getattr(_SCRATCH, "arrays", None)
    if arrays is None or len(arrays[0]) < num_rows or arrays[0].shape[1] != num_concepts:
        arrays = np.empty((num_rows, num_concepts), np.float32), np.empty((num_rows, num_concepts), bool)
        _SCRATCH.arrays = arrays
    return arrays
