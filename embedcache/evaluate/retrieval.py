"""Retrieval between the two modalities of trained runs, such as images and texts, on cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Ints, Products, normalize
from embedcache.dataset.pairs import ANY_LANGUAGE, Items, Pairs, pair_items
from embedcache.devices import products_on
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.overlap import ItemSet, Overlap, find_overlap, largest_overlap
from embedcache.evaluate.runs import (
    EvalSplit,
    Run,
    RunPaths,
    iterate_recipes,
    load_runs,
    read_eval_split,
    report_line,
    run_input,
)
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.files import AnyPath
from embedcache.metrics.intervals import (
    Estimate,
    bootstrap_means,
    bootstrap_median,
    chance_estimate,
    effective_number,
    over_seeds,
)
from embedcache.metrics.neighbors import note_duration
from embedcache.metrics.ranking import average_precisions, first_ranks, negatives_before, recall_at, tied_chance_recall
from embedcache.modalities import directions, noun
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.projectors.saved import project
from embedcache.settings import replace_flat
from embedcache.store.cache import Cache

KS = (1, 5, 10)
_MAX_K = 100


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


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recalls of the seeds of one recipe, with the chance level on the same items.

    Args:
        part: description of the part.
        language: language of the captions; None is all.
        recalls: direction -> `r@k` -> mean over runs and queries, with a 95% interval from resampling near-duplicate
            groups.
        rank_metrics: direction -> `map`, the mean average precision, and `median_rank`, with 95% intervals of the same
            kind.
        curves: direction -> mean recalls at k = 1, 2, … up to 100 or the number of candidates.
        chance: as `recalls`, for random vectors, equal ones of equal items: the expectation, and the range of 95% of
            random orders.
        over_seeds: as `recalls`, with 95% intervals that hold the variance of seeds, too; empty for one run.
        distinct: as `recalls`, with each image and each caption once; empty if none is repeated.
        distinct_chance: as `chance`, with each once; empty if none is repeated.
        by_width: width -> as `recalls`, by the first components of the shared space, ascending and with the whole width
            last; empty if no smaller width was ranked.
        by_seed: mean recall over both directions and all k of each run, in the order of `seeds`.
        num_items: modality -> number of items per run, first that of the first direction's queries.
        seeds: random seed of each run.
        overlap: the largest overlap of a run with its training part; None if it was not checked.
        run_paths: folder of each run.
    """

    part: str
    language: str | None
    recalls: dict[str, dict[str, Estimate]]
    rank_metrics: dict[str, dict[str, Estimate]]
    curves: dict[str, list[float]]
    chance: dict[str, dict[str, Estimate]]
    by_seed: list[float]
    num_items: dict[str, list[int]]
    seeds: list[int]
    overlap: Overlap | None
    run_paths: Sequence[Path] = ()
    over_seeds: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    distinct: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    distinct_chance: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    by_width: dict[int, dict[str, dict[str, Estimate]]] = field(default_factory=dict)

    def line(self) -> str:
        """Summarize what was measured in one line, with a warning if the part overlaps with the training part."""
        of_language = f" in {self.language}" if self.language else ""
        nouns = {modality: "captions" if modality == "text" else noun(modality) for modality in self.num_items}
        counts = ", ".join(f"{self.num_items[modality][0]:,} {name}" for modality, name in nouns.items())
        return report_line(
            f"{self.part}: {counts}{of_language} per run", self.seeds, self.by_seed, "mean recall", self.warning
        )

    @property
    def directions(self) -> tuple[str, str]:
        """Names of both directions, such as `i2t` and `t2i`."""
        return directions(tuple(self.num_items))

    @property
    def warning(self) -> str | None:
        """Warning that the results are too high, or None."""
        return self.overlap.warning if self.overlap else None


def evaluate_retrieval(
    cache_path: AnyPath,
    run_paths: RunPaths,
    settings: RetrievalSettings | None = None,
    *,
    is_control: bool = False,
    progress: AnyProgress = None,
    **options: Any,
) -> RetrievalReport:
    """Rank the items of one part of a cache with a run, or with the seeds of one recipe, which are averaged.

    The cache may be one that the runs were trained on, or any other with features of the same encoders. Of a part with
    more than `max_samples` samples as many are drawn, the same for every run. Memory: the features of the ranked
    samples, and tiles of similarities.

    Args:
        cache_path: the cache.
        run_paths: one run, or seeds of one recipe.
        settings: part, language and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        is_control: require that the runs were trained on shuffled pairs.
        progress: reports before a long ranking how long it takes.

    Raises:
        SettingError: no run, two of one seed, a control that was not trained on shuffled pairs, several languages, or a
            width above that of the shared space.
        FingerprintError: a run was trained on features from another encoder, or with another recipe than the others.
        DataError: the part is empty.
    """
    settings = replace_flat(settings or RetrievalSettings(), options)
    progress = to_progress(progress)
    cache, runs = Cache(cache_path), load_runs(run_paths, is_control=is_control, device=settings.device)
    rankings = [rank(cache, run, settings, progress=progress) for run in runs]
    modalities = runs[0].config.modalities
    both = directions(modalities)
    measured = [_measure(rankings, direction) for direction in both]
    recalls, rank_metrics, curves = (dict(zip(both, values, strict=True)) for values in zip(*measured, strict=True))
    has_repeats = any(ranking.distinct for ranking in rankings)
    distinct = [ranking.distinct or ranking for ranking in rankings] if has_repeats else []
    return RetrievalReport(
        part=rankings[0].part,
        language=_language(runs[0], settings),
        recalls=recalls,
        rank_metrics=rank_metrics,
        curves=curves,
        chance=_chances(rankings, both),
        by_seed=[_mean_recall(ranking) for ranking in rankings],
        num_items={
            modalities[0]: [len(ranking.first) for ranking in rankings],
            modalities[1]: [len(ranking.second) for ranking in rankings],
        },
        seeds=[ranking.seed for ranking in rankings],
        overlap=largest_overlap(ranking.overlap for ranking in rankings),
        run_paths=[run.path for run in runs],
        over_seeds=_over_seeds(rankings, recalls) if len(rankings) > 1 else {},
        distinct={direction: _recalls(distinct, direction) for direction in both if distinct},
        distinct_chance=_chances(distinct, both if distinct else ()),
        by_width=_recalls_by_width(rankings, recalls),
    )


def compare_retrieval(
    cache_path: AnyPath,
    run_paths: RunPaths,
    settings: RetrievalSettings | None = None,
    *,
    control_run: RunPaths = (),
    progress: AnyProgress = None,
    **options: Any,
) -> dict[str, RetrievalReport]:
    """Evaluate several recipes, each in every language of the settings; seeds of one recipe are averaged.

    Args:
        cache_path: the cache.
        run_paths: runs of any recipes.
        settings: part, languages and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        control_run: runs trained on shuffled pairs.
        progress: reports before a long ranking how long it takes.

    Returns:
        Name of the recipe, with the language if there are several -> report.
    """
    settings = replace_flat(settings or RetrievalSettings(), options)
    progress = to_progress(progress)
    reports = {}
    for name, paths, is_control in iterate_recipes(run_paths, control_run):
        for language in settings.language or ("",):
            per_language = replace(settings, language=(language,) if language else ())
            title = f"{name}, {language}" if language else name
            reports[title] = evaluate_retrieval(
                cache_path, paths, per_language, is_control=is_control, progress=progress
            )
    return reports


def rank(
    cache: Cache, run: Run, settings: RetrievalSettings | None = None, *, progress: Progress | None = None
) -> Ranking:
    """Project and rank one part of a cache with one run, in both directions."""
    settings = settings or RetrievalSettings(check_overlap=False)
    modalities = run.config.modalities
    sides = [run_input(cache, run.config, modality) for modality in modalities]
    split = read_eval_split(cache, run, settings.part)
    pairs = pair_items([cache], *([side] for side in sides), language=_language(run, settings)).select(split.samples)
    if not len(pairs.samples):
        raise DataError(
            f"{split.part} of {cache.path}: expected samples with both features, got none; check --language and --part"
        )
    pairs, part = _draw_samples(pairs, split.part, settings.max_samples)
    split = split._replace(part=part)
    num_pairs = 2 * len(pairs.first.rows) * len(pairs.second.rows)
    note_duration(progress or NullProgress(), "ranking", num_pairs, run.config.shared_width)
    item_sets = [ItemSet(side, items) for side, items in zip(sides, (pairs.first, pairs.second), strict=True)]
    first, second = (
        project(tower, item_set.feature.read(item_set.items.rows), device=run.device)
        for tower, item_set in zip(run.pair.towers, item_sets, strict=True)
    )
    products = products_on(run.device)
    ranking = _rank_items(run.seed, split, modalities, pairs, (first, second), pairs.positives(), products)
    return replace(
        ranking,
        distinct=_rank_distinct(ranking, split, products),
        by_width=_ranks_by_width(ranking, _smaller_widths(run, settings), products),
        overlap=find_overlap(run, cache, dict(zip(modalities, item_sets, strict=True)), settings),
    )


def _smaller_widths(run: Run, settings: RetrievalSettings) -> list[int]:
    """Return the widths to rank by besides the whole, ascending: those of the settings, or of the training."""
    whole = run.config.shared_width
    if too_wide := [width for width in settings.widths if width > whole]:
        raise SettingError(
            f"widths: expected at most the width of the shared space of {run.path}, {whole}, got {too_wide[0]}"
        )
    widths = settings.widths or run.config.training.get("loss", {}).get("widths", ())
    return sorted(set(widths) - {whole})


def _ranks_by_width(ranking: Ranking, widths: Sequence[int], products: Products) -> dict[int, dict[str, Ints]]:
    ranks: dict[int, dict[str, Ints]] = {}
    for width in widths:
        first, second = normalize(ranking.first[:, :width]), normalize(ranking.second[:, :width])
        counts = _negatives_before(ranking.modalities, (first, second), ranking.positives, products)
        ranks[width] = {direction: first_ranks(*of_direction) for direction, of_direction in counts.items()}
    return ranks


def _negatives_before(
    modalities: tuple[str, ...], vectors: tuple[Floats, Floats], positives: tuple[Ints, Ints], products: Products
) -> dict[str, tuple[Ints, Ints]]:
    """Return, by direction, the query of each positive pair and the number of negatives ranked before the positive."""
    (first, second), (first_M, second_M) = vectors, positives
    there, back = directions(modalities)
    return {
        there: (first_M, negatives_before(first, second, (first_M, second_M), products=products)),
        back: (second_M, negatives_before(second, first, (second_M, first_M), products=products)),
    }


def _rank_items(
    seed: int,
    split: EvalSplit,
    modalities: tuple[str, ...],
    pairs: Pairs,
    vectors: tuple[Floats, Floats],
    positives: tuple[Ints, Ints],
    products: Products,
) -> Ranking:
    (first, second), before = vectors, _negatives_before(modalities, vectors, positives, products)
    return Ranking(
        seed=seed,
        part=split.part,
        pairs=pairs,
        groups=split.groups,
        modalities=modalities,
        first=first,
        second=second,
        positives=positives,
        ranks={direction: first_ranks(*counts) for direction, counts in before.items()},
        average_precisions={direction: average_precisions(*counts) for direction, counts in before.items()},
        overlap=None,
    )


def _draw_samples(pairs: Pairs, part: str, max_samples: int) -> tuple[Pairs, str]:
    """Draw the samples to rank from a part that has more; return their pairs, and the part with how many they are."""
    samples = pairs.samples
    if not max_samples or len(samples) <= max_samples:
        return pairs, part
    drawn = np.sort(np.random.default_rng(0).choice(samples, max_samples, replace=False))
    described = f"{part}, {max_samples:,} of {len(samples):,} samples drawn at random (--max-samples 0 ranks all)"
    return pairs.select(drawn), described


def _rank_distinct(ranking: Ranking, split: EvalSplit, products: Products) -> Ranking | None:
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
    return _rank_items(ranking.seed, split, ranking.modalities, pairs, vectors, (first_M, second_M), products)


def _language(run: Run, settings: RetrievalSettings) -> str | None:
    if len(settings.language) > 1:
        languages = ", ".join(settings.language)
        raise SettingError(f"language: expected one language, got {languages}; use compare_retrieval for several")
    language: str | None = settings.language[0] if settings.language else run.config.training["language"]
    return None if language == ANY_LANGUAGE else language


def _measure(
    rankings: Sequence[Ranking], direction: str
) -> tuple[dict[str, Estimate], dict[str, Estimate], list[float]]:
    """Compute recalls, mean average precision with median rank, and the curve, over the queries of all runs."""
    ranks = np.concatenate([ranking.ranks[direction] for ranking in rankings])
    precisions = np.concatenate([ranking.average_precisions[direction] for ranking in rankings])
    groups = _groups(rankings, direction)
    num_candidates = max(ranking.num_candidates(direction) for ranking in rankings)
    return (
        _recalls(rankings, direction),
        {"map": bootstrap_means(precisions[:, None], groups)[0], "median_rank": bootstrap_median(ranks, groups)},
        [float(np.mean(ranks <= k)) for k in range(1, min(_MAX_K, num_candidates) + 1)],
    )


def _recalls(rankings: Sequence[Ranking], direction: str) -> dict[str, Estimate]:
    ranks = np.concatenate([ranking.ranks[direction] for ranking in rankings])
    recalls = bootstrap_means(ranks[:, None] <= np.array(KS), _groups(rankings, direction))
    return {f"r@{k}": estimate for k, estimate in zip(KS, recalls, strict=True)}


def _recalls_by_width(
    rankings: Sequence[Ranking], recalls: Mapping[str, Mapping[str, Estimate]]
) -> dict[int, dict[str, dict[str, Estimate]]]:
    by_width = {
        width: {
            direction: _recalls([replace(ranking, ranks=ranking.by_width[width]) for ranking in rankings], direction)
            for direction in recalls
        }
        for width in rankings[0].by_width
    }
    whole = {direction: dict(estimates) for direction, estimates in recalls.items()}
    return {**by_width, rankings[0].first.shape[1]: whole} if by_width else {}


def _groups(rankings: Sequence[Ranking], direction: str) -> Ints:
    return np.concatenate([ranking.groups[ranking.queries(direction)] for ranking in rankings])


def _over_seeds(
    rankings: Sequence[Ranking], recalls: Mapping[str, Mapping[str, Estimate]]
) -> dict[str, dict[str, Estimate]]:
    estimates: dict[str, dict[str, Estimate]] = {}
    for direction, over_items in recalls.items():
        queries = [ranking.queries(direction) for ranking in rankings]
        has_same_items = all(np.array_equal(queries[0], other) for other in queries[1:])
        estimates[direction] = {}
        for k in KS:
            values = [recall_at(ranking.ranks[direction], k) for ranking in rankings]
            estimates[direction][f"r@{k}"] = over_seeds(over_items[f"r@{k}"], values, has_same_items=has_same_items)
    return estimates


def _mean_recall(ranking: Ranking) -> float:
    return float(np.mean([np.mean(ranking.ranks[direction] <= k) for direction in ranking.ranks for k in KS]))


def _chances(rankings: Sequence[Ranking], both: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    return {direction: {f"r@{k}": _chance(rankings, direction, k) for k in KS} for direction in both}


def _chance(rankings: Sequence[Ranking], direction: str, k: int) -> Estimate:
    expected, num_queries = [], 0
    for ranking in rankings:
        queries, candidates = ranking.sides(direction)
        positives = ranking.positives if ranking.is_forward(direction) else ranking.positives[::-1]
        expected.append(tied_chance_recall(positives, candidates.contents, k))
        num_queries += effective_number(queries.contents)
    return chance_estimate(float(np.mean(expected)), num_queries)
