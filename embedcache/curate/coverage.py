"""How well a pool covers a list of concepts: one exact pass over its vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

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
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SettingError
from embedcache.metrics.inequality import gini, top_fraction
from embedcache.metrics.neighbors import top_k
from embedcache.progress import NullProgress, Progress
from embedcache.search.concepts import Concepts, open_concepts
from embedcache.search.index import IndexCard
from embedcache.search.vectors import Engine, Vectors, run_pass
from embedcache.store.cache import Cache

_NUM_NEAR = 8
"""Nearest concepts that each is compared with for overlap."""


@dataclass(frozen=True, kw_only=True)
class CoverageSettings:
    """When an item counts for a concept, and what is kept of it.

    Args:
        threshold: a cosine, the same for all concepts; None calibrates one for each.
        deviations: calibrated: how many standard deviations above the concept's background.
        k: the best items kept of each concept.
        min_count: a concept with fewer items is a gap.

    Raises:
        SettingError: a value out of its range.
    """

    threshold: float | None = None
    deviations: float = 4.0
    k: int = 10
    min_count: int = 20

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold < 1:
            raise SettingError(f"threshold is {self.threshold}; it is a cosine, so it must be from -1 to below 1")
        if not self.deviations > 0:
            raise SettingError(f"deviations is {self.deviations}; it must be above 0, such as 4")
        if self.k < 1:
            raise SettingError(f"k is {self.k}; it must be at least 1")
        if self.min_count < 1:
            raise SettingError(f"min_count is {self.min_count}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ConceptCounts:
    """What a pool, or a selection of it, holds of each concept.

    Args:
        name: of the pool or the selection, for people.
        num_items: looked at.
        num_covered: of them, above the threshold of at least one concept.
        counts: (C,) above each concept's threshold; an item counts for as many concepts as it is above.
        assigned: (C,) covered items by the concept they are most similar to, of those they are above.
    """

    name: str
    num_items: int
    num_covered: int
    counts: Ints
    assigned: Ints

    def gaps(self, min_count: int) -> Ints:
        """Find the concepts with fewer items, the emptiest first."""
        order: Ints = np.argsort(self.counts, kind="stable")
        return order[self.counts[order] < min_count]

    @property
    def gini(self) -> float:
        """How unevenly items are spread over concepts: 0 is evenly."""
        return gini(self.counts)

    def top_share(self, share: float) -> float:
        """Share of all matches that go to the largest concepts, such as the top 1 %."""
        return top_fraction(self.counts, share)


@dataclass(frozen=True, kw_only=True)
class ConceptOverlap:
    """Two concepts that share items.

    Args:
        one: number of the first.
        other: number of the second.
        num: items above both thresholds.
        jaccard: these as a share of the items above at least one of the two.
        cosine: of the concepts' vectors.
    """

    one: int
    other: int
    num: int
    jaccard: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """What was found.

    Args:
        pool: what was looked at.
        concepts: what was looked for.
        settings: how.
        background: of each concept, on a random sample of the pool.
        thresholds: (C,) float32.
        whole: counts of the pool.
        selected: counts of a selection, by the same thresholds.
        scores: (C, k) float32, the most similar items of the pool, best first.
        rows: (C, k) their rows.
        near: (C,) the nearest other concept; -1 where there is none.
        overlaps: concepts that share items, by their number times their share; each is compared with the 8 nearest.
        index: through which items were found; None where each was compared.
    """

    pool: Vectors
    concepts: Concepts
    settings: CoverageSettings
    background: Background
    thresholds: Floats
    whole: ConceptCounts
    selected: ConceptCounts | None
    scores: Floats
    rows: Ints
    near: Ints
    overlaps: Sequence[ConceptOverlap]
    index: IndexCard | None = None

    def line(self) -> str:
        """Say what was looked at, in one line."""
        through = "" if self.pool.run_path is None else f" through {self.pool.run_path.name}"
        fewest, most = int(self.concepts.counts.min()), int(self.concepts.counts.max())
        of = self.concepts.source["of"]
        each = f"{most:,} {of if most > 1 else of[:-1]}" if fewest == most else f"{fewest:,} to {most:,} {of}"
        return (
            f"{self.pool.cache.path.name}: {self.whole.num_items:,} {self.pool.modality}s, {self.pool.feature.name}"
            f"{through}; {len(self.concepts.names):,} concepts of {each}; {self.rule()}"
        )

    def rule(self) -> str:
        """Say when an item counts for a concept."""
        if self.settings.threshold is not None:
            return f"threshold {self.settings.threshold:g} for all"
        lowest, highest = self.thresholds.min(), self.thresholds.max()
        return (
            f"thresholds {self.settings.deviations:g} deviations above each background ({lowest:.3f} to {highest:.3f})"
        )

    @property
    def by_chance(self) -> float | None:
        """How many items of the pool a normal background puts above a calibrated threshold."""
        if self.settings.threshold is not None:
            return None
        return self.whole.num_items * NormalDist().cdf(-self.settings.deviations)

    def warnings(self) -> list[str]:
        """Say what makes the counts doubtful."""
        found = []
        if self.index is not None:
            found.append(
                f"through an index, {self.index.factory}, which found {self.index.recall_at_10:.3f} of the 10 nearest "
                "when it was measured: a count may be too low, never too high"
            )
        if self.by_chance is not None and self.by_chance >= self.settings.min_count:
            found.append(
                f"WARNING: where a background is normal, {self.by_chance:,.0f} of {self.whole.num_items:,} items are "
                f"above a threshold by chance, and {self.settings.min_count:,} already make a concept no gap; raise "
                "--deviations"
            )
        num_low = int((self.thresholds <= self.background.quantiles[:, 0]).sum())
        if num_low:
            found.append(
                f"WARNING: of {num_low:,} of {len(self.thresholds):,} concepts at least half of the pool is above the "
                "threshold; raise --threshold"
            )
        return found

    @property
    def parts(self) -> list[ConceptCounts]:
        """The pool, and the selection where there is one."""
        return [self.whole] if self.selected is None else [self.whole, self.selected]


def measure_coverage(
    cache_path: Path | str,
    concepts_path: Path | str,
    *,
    modality: str = "image",
    feature: str | None = None,
    run_path: Path | str | None = None,
    label: str = "label",
    settings: CoverageSettings | None = None,
    selection: Path | str | None = None,
    index_path: Path | str | None = None,
    engine: Engine = "local",
    address: str | None = None,
    progress: Progress | None = None,
) -> CoverageReport:
    """Count the items of a pool above each concept's threshold, in one pass over its vectors.

    Counts, the best k and what concepts share are exact: each vector is multiplied with each concept's. Through an
    index they lack what it misses. Quantiles and calibrated thresholds come from 16,384 items drawn at random, or all
    where there are no more. Memory: the sample, C × (P + k) numbers, and for each core a chunk, a tile of 8 MB of
    similarities, and a few numbers for each place above a threshold in it.

    Args:
        cache_path: the pool.
        concepts_path: a cache of prompts, or of labeled examples; see `open_concepts`.
        modality: `image` or `text`, of the pool.
        feature: `encoder/feature`; None is the run's, or the only one.
        run_path: project pool and concepts with this run; None compares plain features.
        label: column of the examples' labels.
        settings: thresholds and what is kept.
        selection: count what a selection of the pool holds too.
        index_path: look only at what this index of the pool finds; None looks at everything.
        engine: `local` or `ray`.
        address: of a Ray cluster.
        progress: told about items.

    Raises:
        SettingError: k beyond the items of the pool.
        FingerprintError: concepts or pool come from another encoder than asked, or the index from something else.
        UnknownNameError: no feature or column of that name.
        UnfinishedError: a feature has missing chunks.
        DataError: no item is above any threshold, a concept that stands twice or is empty, features that cannot be
            compared, or a selection of other samples.
    """
    settings = settings or CoverageSettings()
    pool = Vectors(cache_path, modality, feature, run_path)
    if settings.k > len(pool.rows):
        raise SettingError(
            f"k is {settings.k}; {pool.cache.path} holds {len(pool.rows):,} {modality}s with {pool.feature.name}, so k "
            f"must be 1 to {len(pool.rows)}"
        )
    selection = None if selection is None else Path(selection)
    is_selected = None if selection is None else _selected(pool, selection)
    concepts = open_concepts(Cache(concepts_path), pool, label=label)
    background = estimate_background(concepts.vectors, pool.sample(max(SAMPLE, settings.k)), settings.k)
    thresholds = _thresholds(background, settings)
    near, cosines = _near(concepts.vectors)
    work = CoverageCounter(
        concepts.vectors,
        thresholds_C=thresholds,
        floors_C=background.floors,
        near_CJ=near,
        k=settings.k,
        is_selected_N=is_selected,
    )
    card = None
    if index_path is None:
        tally = run_pass(pool, work, engine=engine, address=address, title="counting", progress=progress)
    else:
        index, card = open_index(index_path, pool)
        tally = count_indexed(pool, work, concepts.vectors, index, card.search, progress or NullProgress())
    scores, rows = tally.best.table()
    _refuse_nothing(tally, scores, thresholds, concepts, pool)
    names = [f"all {modality}s", *([selection.name] if selection else [])]
    whole, *others = [_counts(tally, group, name) for group, name in enumerate(names)]
    return CoverageReport(
        pool=pool,
        concepts=concepts,
        settings=settings,
        background=background,
        thresholds=thresholds,
        whole=whole,
        selected=others[0] if others else None,
        scores=scores,
        rows=rows,
        near=near[:, 0] if near.shape[1] else np.full(len(near), -1),
        overlaps=_overlaps(whole.counts, tally.shared, near, cosines),
        index=card,
    )


def _selected(pool: Vectors, path: Path) -> Bools:
    """Say of each row of the pool's modality whether its sample is selected: (N,)."""
    samples = read_selection(path, [pool.cache])
    is_selected: Bools = np.isin(pool.cache.items(pool.modality)["sample"].to_numpy(), samples)
    return is_selected


def _thresholds(background: Background, settings: CoverageSettings) -> Floats:
    if settings.threshold is None:
        return background.thresholds(settings.deviations)
    return np.full(len(background.spreads), settings.threshold, np.float32)


def _near(concepts_CP: Floats) -> tuple[Ints, Floats]:
    """Find the concepts nearest to each, without itself, and their cosines: (C, J)."""
    num_near = min(_NUM_NEAR, len(concepts_CP) - 1)
    return top_k(concepts_CP, concepts_CP, num_near, exclude_self=True)


def _refuse_nothing(
    tally: PartialCoverage, scores_CK: Floats, thresholds_C: Floats, concepts: Concepts, pool: Vectors
) -> None:
    if tally.num_covered[0]:
        return
    closest = int(np.argmax(scores_CK[:, 0] - thresholds_C))
    raise DataError(
        f"none of {tally.num_items[0]:,} {pool.modality}s of {pool.cache.path} is above the threshold of any of "
        f"{len(concepts.names):,} concepts; the closest is {concepts.names[closest]!r}: highest similarity "
        f"{scores_CK[closest, 0]:.3f}, threshold {thresholds_C[closest]:.3f}; the highest similarity of all is "
        f"{scores_CK[:, 0].max():.3f}; give a lower --threshold, or fewer --deviations"
    )


def _counts(tally: PartialCoverage, group: int, name: str) -> ConceptCounts:
    return ConceptCounts(
        name=name,
        num_items=int(tally.num_items[group]),
        num_covered=int(tally.num_covered[group]),
        counts=tally.counts[group],
        assigned=tally.assigned[group],
    )


def _overlaps(counts_C: Ints, shared_CJ: Ints, near_CJ: Ints, cosines_CJ: Floats) -> list[ConceptOverlap]:
    """List each pair of near concepts that share an item once: first those that share many, and much of theirs."""
    found: dict[tuple[int, int], ConceptOverlap] = {}
    for one, place in zip(*np.nonzero(shared_CJ), strict=True):
        other, num = int(near_CJ[one, place]), int(shared_CJ[one, place])
        pair = (min(int(one), other), max(int(one), other))
        union = int(counts_C[one] + counts_C[other]) - num
        cosine = float(cosines_CJ[one, place])
        found[pair] = ConceptOverlap(one=pair[0], other=pair[1], num=num, jaccard=num / union, cosine=cosine)
    return sorted(found.values(), key=lambda shared: (-shared.jaccard * shared.num, shared.one, shared.other))
