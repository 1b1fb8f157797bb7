"""The ranks of the items of one part of a cache by one run, in both directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from embedcache.arrays import Array, Floats, Ints, Products, normalize
from embedcache.dataset.matches import ItemSet
from embedcache.dataset.pairs import ANY_LANGUAGE, Items, Pairs, number_items, pair_items
from embedcache.devices import products_on
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.overlap import Overlap, find_overlap
from embedcache.evaluate.runs import EvalSplit, read_eval_split, run_input
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.metrics.ranking import average_precisions, first_ranks, negatives_before
from embedcache.modalities import directions, noun
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The rank of every query of one part with one run, and the projected items.

    Args:
        part: description of the part.
        groups: (S,) int64 number of the near-duplicate group of each sample of the cache.
        modalities: modality of the first and the second items of the pairs.
        first: (I, P) float32 rows of length 1, in the order of `pairs.first`.
        second: (T, P) float32 rows of length 1, in the order of `pairs.second`.
        positives: two (M,) arrays: first item i and second item j of each positive pair.
        ranks: direction, such as `i2t` and `t2i`, -> (I,) or (T,): rank of the best positive among all candidates, 1 is
            the top.
        average_precisions: as `ranks`: average precision of each query.
        distinct: the same with each image and each caption once; None if no content is repeated.
        by_width: smaller width -> `ranks` by that many first components of `first` and `second`, of length 1 again.
    """

    seed: int
    part: str
    pairs: Pairs
    groups: Ints
    modalities: tuple[str, ...]
    first: Floats
    second: Floats
    positives: tuple[Ints, Ints]
    ranks: dict[str, Ints]
    average_precisions: dict[str, Array]
    overlap: Overlap | None
    distinct: "Ranking | None" = None
    by_width: Mapping[int, dict[str, Ints]] = field(default_factory=dict)

    def queries(self, direction: str) -> Ints:
        """Return the sample of each query."""
        return self.sides(direction)[0].samples

    def num_candidates(self, direction: str) -> int:
        """Return the number of candidates of each query."""
        return len(self.sides(direction)[1].rows)

    def sides(self, direction: str) -> tuple[Items, Items]:
        """Return the queries and the candidates of a direction."""
        first, second = self.pairs.first, self.pairs.second
        return (first, second) if self.is_forward(direction) else (second, first)

    def is_forward(self, direction: str) -> bool:
        """Return whether the first items are the queries."""
        return direction == directions(self.modalities)[0]


def rank(
    cache: Cache, run: Run, settings: RetrievalSettings | None = None, *, progress: Progress | None = None
) -> Ranking:
    """Project and rank one part of a cache with one run, in both directions."""
    settings = settings or RetrievalSettings(check_overlap=False)
    modalities = run.modalities
    sides = [run_input(cache, run, modality) for modality in modalities]
    split = read_eval_split(cache, run, settings.part)
    progress, language = progress or NullProgress(), ranked_language(run, settings)
    pairs = pair_items(
        [cache], *([side] for side in sides), language=language, is_numbered=False, progress=progress
    ).select(split.samples)
    if not len(pairs.samples):
        raise DataError(
            f"{split.part} of {cache.path}: expected samples with both features, got none; check --language and --part"
        )
    pairs, part = _draw_samples(pairs, split.part, settings.max_samples)
    pairs = Pairs(first=number_items(pairs.first, sides[0]), second=number_items(pairs.second, sides[1]))
    split = split._replace(part=part)
    products = products_on(run.device)
    item_sets = [ItemSet(side, items) for side, items in zip(sides, (pairs.first, pairs.second), strict=True)]
    widths = _smaller_widths(run, settings)
    first, second = (_project(run, item_set, progress) for item_set in item_sets)
    counter = _Counter(modalities, products, progress)
    ranking = _rank_items(run.seed, split, pairs, (first, second), pairs.positives(), counter)
    return replace(
        ranking,
        distinct=_rank_distinct(ranking, split, counter),
        by_width=_ranks_by_width(ranking, widths, counter),
        overlap=find_overlap(run, cache, dict(zip(modalities, item_sets, strict=True)), settings, progress=progress),
    )


def _project(run: Run, items: ItemSet, progress: Progress) -> Floats:
    """Project the items of one side: (N, P) float32."""
    modality = items.feature.modality
    progress.start(f"projecting {noun(modality)}", len(items.items.rows), noun(modality))
    inputs = items.feature.read(items.items.rows)
    projected_NP = project(run.pair.tower(modality), inputs, device=run.device, progress=progress)
    progress.finish()
    return projected_NP


def _smaller_widths(run: Run, settings: RetrievalSettings) -> list[int]:
    """Return the widths to rank by besides the whole, ascending: those of the settings, or of the training."""
    whole = run.shared_width
    if too_wide := [width for width in settings.widths if width > whole]:
        raise SettingError(
            f"widths: expected at most the width of the shared space of {run.path}, {whole}, got {too_wide[0]}"
        )
    widths = settings.widths or run.info.settings.get("loss", {}).get("widths", ())
    return sorted(set(widths) - {whole})


def _ranks_by_width(ranking: Ranking, widths: Sequence[int], counter: "_Counter") -> dict[int, dict[str, Ints]]:
    ranks: dict[int, dict[str, Ints]] = {}
    for width in widths:
        first, second = normalize(ranking.first[:, :width]), normalize(ranking.second[:, :width])
        counts = counter.negatives_before(f"ranking by width {width}", (first, second), ranking.positives)
        ranks[width] = {direction: first_ranks(*of_direction) for direction, of_direction in counts.items()}
    return ranks


@dataclass(frozen=True)
class _Counter:
    """Counts the negatives before positives in both directions, with progress in queries."""

    modalities: tuple[str, ...]
    products: Products
    progress: Progress

    def negatives_before(
        self, step: str, vectors: tuple[Floats, Floats], positives: tuple[Ints, Ints]
    ) -> dict[str, tuple[Ints, Ints]]:
        """Return, by direction, the query of each positive pair and the number of negatives before the positive."""
        (first, second), (first_M, second_M) = vectors, positives
        there, back = directions(self.modalities)
        self.progress.start(step, len(first) + len(second), "queries")
        counts = {
            there: (first_M, negatives_before(first, second, (first_M, second_M), products=self._products)),
            back: (second_M, negatives_before(second, first, (second_M, first_M), products=self._products)),
        }
        self.progress.finish()
        return counts

    def _products(self, queries_QP: Floats, candidates_CP: Floats) -> Floats:
        products_QC = self.products(queries_QP, candidates_CP)
        self.progress.advance(len(queries_QP))
        return products_QC


def _rank_items(
    seed: int,
    split: EvalSplit,
    pairs: Pairs,
    vectors: tuple[Floats, Floats],
    positives: tuple[Ints, Ints],
    counter: _Counter,
    step: str = "ranking",
) -> Ranking:
    (first, second), before = vectors, counter.negatives_before(step, vectors, positives)
    return Ranking(
        seed=seed,
        part=split.part,
        pairs=pairs,
        groups=split.groups,
        modalities=counter.modalities,
        first=first,
        second=second,
        positives=positives,
        ranks={direction: first_ranks(*counts) for direction, counts in before.items()},
        average_precisions={direction: average_precisions(*counts) for direction, counts in before.items()},
        overlap=None,
    )


def ranked_language(run: Run, settings: RetrievalSettings) -> str | None:
    """Return the language of the captions that are ranked: of the settings, or of the training; None: all."""
    if len(settings.language) > 1:
        languages = ", ".join(settings.language)
        raise SettingError(f"language: expected one language, got {languages}; use compare_retrieval for several")
    language: str | None = settings.language[0] if settings.language else run.info.settings.get("language")
    return None if language == ANY_LANGUAGE else language


def _draw_samples(pairs: Pairs, part: str, max_samples: int) -> tuple[Pairs, str]:
    """Draw the samples to rank from a part that has more; return their pairs, and the part with how many they are."""
    samples = pairs.samples
    if not max_samples or len(samples) <= max_samples:
        return pairs, part
    drawn = np.sort(np.random.default_rng(0).choice(samples, max_samples, replace=False))
    described = f"{part}, {max_samples:,} of {len(samples):,} samples drawn at random (--max-samples 0 ranks all)"
    return pairs.select(drawn), described


def _rank_distinct(ranking: Ranking, split: EvalSplit, counter: _Counter) -> Ranking | None:
    """Rank the first item of each content among those of all other contents; None if no content is repeated."""
    sides = ranking.pairs.first, ranking.pairs.second
    kept = [np.sort(np.unique(side.contents, return_index=True)[1]) for side in sides]
    if all(len(rows) == len(side.rows) for rows, side in zip(kept, sides, strict=True)):
        return None
    first, second = (
        Items(rows=side.rows[rows], samples=side.samples[rows], contents=side.contents[rows])
        for side, rows in zip(sides, kept, strict=True)
    )
    is_kept_M = np.isin(ranking.positives[0], kept[0]) & np.isin(ranking.positives[1], kept[1])
    first_M, second_M = (
        np.searchsorted(rows, positions_M[is_kept_M]) for rows, positions_M in zip(kept, ranking.positives, strict=True)
    )
    vectors = ranking.first[kept[0]], ranking.second[kept[1]]
    pairs = Pairs(first=first, second=second)
    return _rank_items(ranking.seed, split, pairs, vectors, (first_M, second_M), counter, "ranking each content once")
