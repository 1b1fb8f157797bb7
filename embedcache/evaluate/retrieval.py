"""Measure retrieval between the two modalities of trained runs, such as images and texts, on cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Floats, Ints, distinct, normalize
from embedcache.dataset.matches import ItemSet
from embedcache.dataset.pairs import ANY_LANGUAGE, Items, Pairs, number_items, pair_items
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.runs import (
    Overlap,
    RunPaths,
    find_overlap,
    iterate_recipes,
    largest_overlap,
    load_runs,
    read_class_names,
    read_eval_split,
    report_line,
    run_input,
)
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.files import AnyPath
from embedcache.metrics import (
    Estimate,
    average_precisions,
    bootstrap_mean,
    bootstrap_median,
    chance_estimate,
    effective_number,
    first_ranks,
    hit_rates,
    negatives_before,
    over_seeds,
    recall_at,
    tied_chance_recall,
)
from embedcache.modalities import directions, noun, pair_nouns
from embedcache.processes import products_on
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.settings import merge_settings, replace_fields
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import RetrievalOptions

KS = (1, 5, 10)
_RECALLS = {"r@1": 1, "r@5": 5, "r@10": 10}
_MAX_K = 100


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The rank of every query of one part with one run, and the projected items.

    Args:
        part: description of the part.
        groups: (S,) int64 number of the near-duplicate group of each sample of the cache.
        modalities: modality of the first and the second items of the pairs.
        first: (Q, P) float32 rows of length 1, in the order of `pairs.first`.
        second: (C, P) float32 rows of length 1, in the order of `pairs.second`.
        positives: two (M,) arrays: first item i and second item j of each positive pair.
        ranks: direction, such as `i2t` and `t2i`, -> rank of the best positive among all candidates, (Q,) or (C,). The
            top has rank 1.
        average_precisions: direction -> average precision of each query.
        by_width: smaller width -> `ranks` by that many first components of `first` and `second`, of length 1 again.
        named: rows of the samples whose captions name a class of the run's prototypes, None without prototypes.
    """

    seed: int
    part: str
    pairs: Pairs
    groups: Ints
    modalities: tuple[str, ...]
    first: Floats
    second: Floats
    positives: tuple[Ints, Ints]
    ranks: Mapping[str, Ints]
    average_precisions: Mapping[str, Array]
    overlap: Overlap | None
    by_width: Mapping[int, Mapping[str, Ints]] = field(default_factory=dict)
    named: Ints | None = None

    def is_forward(self, direction: str) -> bool:
        """Return whether the first items are the queries."""
        return direction == directions(self.modalities)[0]

    def sides(self, direction: str) -> tuple[Items, Items]:
        """Return the queries and the candidates of a direction."""
        first = self.pairs.first
        second = self.pairs.second
        return (first, second) if self.is_forward(direction) else (second, first)

    def clusters(self, direction: str) -> Ints:
        """Return the near-duplicate group of each query. Groups are resampled for intervals."""
        clusters_Q: Ints = self.groups[self.sides(direction)[0].samples]
        return clusters_Q

    def is_unnamed(self, direction: str) -> Bools:
        """Return whether the captions of each query's sample name no class of the prototypes: (Q,) bool."""
        named_samples = () if self.named is None else self.named
        is_unnamed_Q: Bools = ~np.isin(self.sides(direction)[0].samples, named_samples)
        return is_unnamed_Q


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recalls of the seeds of one recipe, with the chance level on the same items.

    Args:
        part: description of the part.
        language: language of the captions, None for all languages.
        recalls: direction -> `r@k` -> mean over runs and queries, with a 95% interval from resampling near-duplicate
            groups.
        rank_metrics: direction -> `map`, the mean average precision, and `median_rank`, with 95% intervals of the same
            kind.
        curves: direction -> mean recalls at k = 1, 2, … up to 100 or the number of candidates.
        chance: recalls of random vectors, where equal items have equal vectors. The interval is the range of 95% of
            random orders.
        over_seeds: the same recalls with 95% intervals that also cover the variance of seeds, empty for one run.
        by_width: width -> recalls by that many first components of the shared space. Widths ascend to the whole width.
            Empty if no smaller width was ranked.
        by_seed: mean recall over both directions and all k of each run, in the order of `seeds`.
        num_items: modality -> number of items per run, the queries of the first direction first.
        seeds: random seed of each run.
        overlap: the largest overlap of a run with its training part, None if it was not checked.
        run_paths: folder of each run.
        unnamed: recalls of queries whose samples' captions name no class of the runs' prototypes, among all candidates.
            Empty without prototypes, or if every sample names one.
        named_samples: per run, the number of samples whose captions name a class of the prototypes, and of all samples.
            Empty without prototypes.

    Example:
        >>> report = embedcache.evaluate_retrieval("cache", "run", part="val")
        >>> report.directions, sorted(report.recalls["i2t"])
        (('i2t', 't2i'), ['r@1', 'r@10', 'r@5'])
        >>> sorted(report.rank_metrics["t2i"])
        ['map', 'median_rank']
    """

    part: str
    language: str | None
    recalls: Mapping[str, Mapping[str, Estimate]]
    rank_metrics: Mapping[str, Mapping[str, Estimate]]
    curves: Mapping[str, list[float]]
    chance: Mapping[str, Mapping[str, Estimate]]
    over_seeds: Mapping[str, Mapping[str, Estimate]]
    by_width: Mapping[int, Mapping[str, Mapping[str, Estimate]]]
    by_seed: list[float]
    num_items: Mapping[str, list[int]]
    seeds: list[int]
    overlap: Overlap | None
    run_paths: Sequence[Path] = ()
    unnamed: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    named_samples: Sequence[tuple[int, int]] = ()

    def __repr__(self) -> str:
        """Return `line` and, for each direction, its recalls, their chance level and its ranks, for `print`."""
        lines = [self.line()]
        for direction, recalls in self.recalls.items():
            metrics = []
            for k in KS:
                chance = self.chance[direction][f"r@{k}"].value
                metrics.append(f"R@{k} {recalls[f'r@{k}']}, chance {chance:.3f}")

            ranks = self.rank_metrics[direction]
            metrics.append(f"median rank {ranks['median_rank'].value:g}, mAP {ranks['map']}")
            lines.append(f"{direction}: {'; '.join(metrics)}")
        return "\n".join(lines)

    def line(self) -> str:
        """Summarize the measurement in one line, with a warning if the part overlaps with the training part."""
        language = f" in {self.language}" if self.language else ""
        first_noun, second_noun = pair_nouns(tuple(self.num_items))
        first_counts, second_counts = self.num_items.values()
        counts = f"{first_counts[0]:,} {first_noun}, {second_counts[0]:,} {second_noun}"

        # Classes of prototypes were seen in training by their names.
        prototypes = ""
        if self.named_samples:
            num_named, num_samples = self.named_samples[0]
            prototypes = f", {num_named:,} of {num_samples:,} samples name a class of the prototypes"
        start = f"{self.part}: {counts}{language} per run{prototypes}"
        return report_line(start, self.seeds, self.by_seed, "mean recall", self.warning)

    @property
    def directions(self) -> tuple[str, str]:
        """Names of both directions, such as `i2t` and `t2i`."""
        return directions(tuple(self.num_items))

    @property
    def warning(self) -> str | None:
        """Warning that the results are too high, or None."""
        return self.overlap.warning if self.overlap else None


def evaluate_retrieval(
    cache: AnyPath,
    run: RunPaths,
    settings: RetrievalSettings | None = None,
    *,
    is_control: bool = False,
    progress: AnyProgress = None,
    **options: Unpack["RetrievalOptions"],
) -> RetrievalReport:
    """Rank the items of one part of a cache with a run, or with the seeds of one recipe, which are averaged.

    The cache may be one that the runs were trained on, or any other with features of the same encoders. If the part has
    more than `max_samples` samples, the same ones are drawn for every run. Memory: the features of the ranked samples,
    tiles of similarities, and about 270 bytes per sample of the cache, whose items are paired.

    Args:
        cache: the cache.
        run: one run, or seeds of one recipe.
        settings: part, language and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        is_control: require that the runs were trained on shuffled pairs.
        progress: progress in queries.

    Raises:
        SettingError: no run, two runs of one seed, a control that was not trained on shuffled pairs, several languages,
            or a width above the width of the shared space.
        FingerprintError: a run was trained on features from another encoder, or with another recipe than the others.
        DataError: the part is empty.

    Example:
        >>> report = embedcache.evaluate_retrieval("cache", "run", part="val")
        >>> report.recalls["i2t"]["r@10"].value > report.chance["i2t"]["r@10"].value
        True
    """
    settings = merge_settings(RetrievalSettings, settings, options)
    progress = to_progress(progress)
    cache = Cache(cache)
    runs = load_runs(run, is_control=is_control, device=settings.device)
    rankings = [rank(cache, run, settings, progress=progress) for run in runs]
    first = rankings[0]

    # Both directions are reported, as one may be much easier than the other.
    recalls = {}
    rank_metrics = {}
    curves = {}
    chances = {}
    over_runs = {}
    for direction in directions(first.modalities):
        recalls[direction] = _recalls(rankings, direction)
        rank_metrics[direction] = _rank_metrics(rankings, direction)
        curves[direction] = _recall_curve(rankings, direction)
        chances[direction] = _chances(rankings, direction)

        # One run says nothing about the variance of seeds.
        if len(runs) > 1:
            over_runs[direction] = _over_seeds(rankings, direction, recalls[direction])

    # The whole width comes last, for a table that ascends.
    by_width = {}
    for width in first.by_width:
        by_width[width] = {direction: _recalls(rankings, direction, width) for direction in recalls}
    if by_width:
        by_width[first.first.shape[1]] = recalls

    # Prototypes know the names of their classes, so queries that name none are also reported by themselves.
    named_samples = []
    has_unnamed = False
    for ranking in rankings:
        if ranking.named is not None:
            named_samples.append((len(ranking.named), len(ranking.pairs.samples)))
            has_unnamed |= len(ranking.named) < len(ranking.pairs.samples)
    unnamed = {}
    if has_unnamed:
        for direction in recalls:
            unnamed[direction] = _unnamed_recalls(rankings, direction)

    first_modality, second_modality = first.modalities
    return RetrievalReport(
        part=first.part,
        language=ranked_language(runs[0], settings),
        recalls=recalls,
        rank_metrics=rank_metrics,
        curves=curves,
        chance=chances,
        over_seeds=over_runs,
        by_width=by_width,
        by_seed=list(map(_mean_recall, rankings)),
        num_items={
            first_modality: [len(ranking.first) for ranking in rankings],
            second_modality: [len(ranking.second) for ranking in rankings],
        },
        seeds=[run.seed for run in runs],
        overlap=largest_overlap(ranking.overlap for ranking in rankings),
        run_paths=[run.path for run in runs],
        unnamed=unnamed,
        named_samples=named_samples,
    )


def compare_retrieval(
    cache: AnyPath,
    run: RunPaths,
    settings: RetrievalSettings | None = None,
    *,
    control_run: RunPaths = (),
    progress: AnyProgress = None,
    **options: Unpack["RetrievalOptions"],
) -> dict[str, RetrievalReport]:
    """Evaluate several recipes, each in every language of the settings. Seeds of one recipe are averaged.

    Args:
        cache: the cache.
        run: runs of any recipes.
        settings: part, languages and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        control_run: runs trained on shuffled pairs.
        progress: progress in queries.

    Returns:
        Name of the recipe, with the language if there are several -> report.

    Example:
        >>> reports = embedcache.compare_retrieval("cache", ["run"], part="val")
        >>> list(reports)
        ['run']
    """
    settings = merge_settings(RetrievalSettings, settings, options)
    progress = to_progress(progress)

    reports = {}
    for recipe in iterate_recipes(run, control_run):
        for language in settings.language or ("",):
            per_language = replace_fields(settings, language=(language,) if language else ())
            title = f"{recipe.name}, {language}" if language else recipe.name
            reports[title] = evaluate_retrieval(
                cache,
                recipe.run_paths,
                per_language,
                is_control=recipe.is_control,
                progress=progress,
            )
    return reports


def _mean_recall(ranking: Ranking) -> float:
    """Return the mean recall over both directions and all k."""
    recalls = []
    for ranks_Q in ranking.ranks.values():
        recalls.append(np.mean(ranks_Q[:, None] <= KS, axis=0))
    return float(np.mean(recalls))


def _recalls(rankings: Sequence[Ranking], direction: str, width: int | None = None) -> dict[str, Estimate]:
    """Estimate the recalls of all runs together. With a width, use that many components of the shared space."""
    ranks = []
    for ranking in rankings:
        by_direction = ranking.ranks if width is None else ranking.by_width[width]
        ranks.append(by_direction[direction])
    return hit_rates(ranks, _clusters(rankings, direction), _RECALLS)


def _clusters(rankings: Sequence[Ranking], direction: str) -> list[Ints]:
    """Return the near-duplicate group of each query of each run."""
    return [ranking.clusters(direction) for ranking in rankings]


def _unnamed_recalls(rankings: Sequence[Ranking], direction: str) -> dict[str, Estimate]:
    """Estimate the recalls of queries whose samples name no class of the prototypes."""
    ranks = []
    clusters = []
    for ranking in rankings:
        is_unnamed_Q = ranking.is_unnamed(direction)
        ranks.append(ranking.ranks[direction][is_unnamed_Q])
        clusters.append(ranking.clusters(direction)[is_unnamed_Q])
    return hit_rates(ranks, clusters, _RECALLS)


def _over_seeds(rankings: Sequence[Ranking], direction: str, recalls: Mapping[str, Estimate]) -> dict[str, Estimate]:
    by_run = {}
    for k in KS:
        by_run[f"r@{k}"] = [recall_at(ranking.ranks[direction], k) for ranking in rankings]
    return over_seeds(recalls, by_run, _clusters(rankings, direction))


def _rank_metrics(rankings: Sequence[Ranking], direction: str) -> dict[str, Estimate]:
    """Estimate mean average precision and median rank over the queries of all runs."""
    clusters = np.concatenate(_clusters(rankings, direction))
    precisions_Q = np.concatenate([ranking.average_precisions[direction] for ranking in rankings])
    ranks_Q = _pooled_ranks(rankings, direction)
    return {"map": bootstrap_mean(precisions_Q, clusters), "median_rank": bootstrap_median(ranks_Q, clusters)}


def _pooled_ranks(rankings: Sequence[Ranking], direction: str) -> Ints:
    """Return the ranks of the queries of all runs."""
    ranks_Q: Ints = np.concatenate([ranking.ranks[direction] for ranking in rankings])
    return ranks_Q


def _recall_curve(rankings: Sequence[Ranking], direction: str) -> list[float]:
    """Compute recall@k for k from 1 to at most `_MAX_K`."""
    ranks_Q = _pooled_ranks(rankings, direction)
    num_candidates = max(len(ranking.sides(direction)[1].rows) for ranking in rankings)
    max_k = min(_MAX_K, num_candidates)

    # The number of queries with a rank up to k is a cumulated count, which needs one pass for all k.
    counts_K = np.cumsum(np.bincount(ranks_Q.clip(max=max_k + 1), minlength=max_k + 2))[1:-1]
    curve: list[float] = (counts_K / len(ranks_Q)).tolist()
    return curve


def _chances(rankings: Sequence[Ranking], direction: str) -> dict[str, Estimate]:
    # Equal queries are right or wrong together, so they count as fewer independent ones.
    num_queries = 0
    for ranking in rankings:
        queries, _ = ranking.sides(direction)
        num_queries += effective_number(queries.contents)

    # Runs may rank different items, so their chance levels are averaged like their recalls.
    chances = {}
    for k in KS:
        expected = float(np.mean([chance_at(ranking, direction, k) for ranking in rankings]))
        chances[f"r@{k}"] = chance_estimate(expected, num_queries)
    return chances


def chance_at(ranking: Ranking, direction: str, k: int) -> float:
    """Compute the expected recall at k of random vectors, where equal items have equal vectors."""
    positives = ranking.positives if ranking.is_forward(direction) else ranking.positives[::-1]
    return tied_chance_recall(positives, ranking.sides(direction)[1].contents, k)


def rank(
    cache: Cache, run: Run, settings: RetrievalSettings | None = None, *, progress: Progress | None = None
) -> Ranking:
    """Project and rank one part of a cache with one run, in both directions."""
    settings = settings or RetrievalSettings(check_overlap=False)
    progress = progress or NullProgress()
    first_modality, second_modality = run.modalities
    first_feature = run_input(cache, run, first_modality)
    second_feature = run_input(cache, run, second_modality)
    split = read_eval_split(cache, run, settings.part, settings.selection)
    language = ranked_language(run, settings)

    # Contents are numbered below, when fewer items are left.
    pairs = pair_items(
        [cache], [first_feature], [second_feature], language=language, is_numbered=False, progress=progress
    ).select(split.samples)
    if not len(pairs.samples):
        raise DataError(
            f"{split.part} of {cache.path}: expected samples with both features, got none; check --language and --part"
        )

    # Equal items of the drawn samples get one number, by which ties and chance levels are computed.
    pairs, part = _draw_samples(pairs, split.part, settings.max_samples)
    pairs = Pairs(first=number_items(pairs.first, first_feature), second=number_items(pairs.second, second_feature))
    first_items = ItemSet(first_feature, pairs.first)
    second_items = ItemSet(second_feature, pairs.second)

    # A width that is too large is rejected before the items are projected.
    widths = _smaller_widths(run, settings)
    first_NP = _project(run, first_items, progress)
    second_NP = _project(run, second_items, progress)
    positives = pairs.positives()
    whole_counts = _count_before(run, "ranking", first_NP, second_NP, positives, progress)
    ranks = {}
    precisions = {}
    for direction, count in whole_counts.items():
        ranks[direction] = first_ranks(*count)
        precisions[direction] = average_precisions(*count)

    # The first components of a vector are scaled to length 1 again, so that products are cosines.
    by_width = {}
    for width in widths:
        narrow_first_NP = normalize(first_NP[:, :width])
        narrow_second_NP = normalize(second_NP[:, :width])
        counts = _count_before(run, f"ranking by width {width}", narrow_first_NP, narrow_second_NP, positives, progress)
        by_width[width] = {direction: first_ranks(*count) for direction, count in counts.items()}

    items = {first_modality: first_items, second_modality: second_items}

    return Ranking(
        seed=run.seed,
        part=part,
        pairs=pairs,
        groups=split.groups,
        modalities=run.modalities,
        first=first_NP,
        second=second_NP,
        positives=positives,
        ranks=ranks,
        average_precisions=precisions,
        overlap=find_overlap(run, cache, items, settings, progress=progress),
        by_width=by_width,
        named=_find_named(cache, run, pairs),
    )


def _find_named(cache: Cache, run: Run, pairs: Pairs) -> Ints | None:
    """Return the samples whose captions name a class of the run's prototypes, None without prototypes or captions."""
    class_names = read_class_names(run)
    if class_names is None or "text" not in run.modalities:
        return None
    captions = dict(zip(run.modalities, (pairs.first, pairs.second), strict=True))["text"]
    texts = cache.items("text", columns=["text"])["text"].take(pa.array(captions.rows))
    return distinct(captions.samples[class_names.are_in(texts.to_pylist())])


def ranked_language(run: Run, settings: RetrievalSettings) -> str | None:
    """Return the language of the ranked captions, from the settings or from training. None means all languages."""
    if len(settings.language) > 1:
        languages = ", ".join(settings.language)
        raise SettingError(f"language: expected one language, got {languages}; use compare_retrieval for several")
    language: str | None = settings.language[0] if settings.language else run.info.settings.get("language")
    return None if language == ANY_LANGUAGE else language


def _draw_samples(pairs: Pairs, part: str, max_samples: int) -> tuple[Pairs, str]:
    """Draw the samples to rank if a part has too many. Return their pairs, and the part with their number."""
    samples = pairs.samples
    if not max_samples or len(samples) <= max_samples:
        return pairs, part

    ranked_samples = np.sort(np.random.default_rng(0).choice(samples, max_samples, replace=False))
    described = f"{part}, {max_samples:,} of {len(samples):,} samples drawn at random (--max-samples 0 ranks all)"
    return pairs.select(ranked_samples), described


def _smaller_widths(run: Run, settings: RetrievalSettings) -> list[int]:
    """Return the smaller widths to rank by, ascending, from the settings or from training."""
    whole = run.shared_width
    for width in settings.widths:
        if width > whole:
            raise SettingError(
                f"widths: expected at most the width of the shared space of {run.path}, {whole}, got {width}"
            )
    widths = settings.widths or run.info.settings.get("loss", {}).get("widths", ())
    return sorted(set(widths) - {whole})


def _project(run: Run, items: ItemSet, progress: Progress) -> Floats:
    """Project the items of one side: (N, P) float32."""
    modality = items.feature.modality
    progress.start(f"projecting {noun(modality)}", len(items.items.rows), noun(modality))
    inputs = items.feature.read(items.items.rows)
    projected_NP = project(run.pair.tower(modality), inputs, device=run.device, progress=progress)
    progress.finish()
    return projected_NP


def _count_before(
    run: Run, step: str, first_NP: Floats, second_NP: Floats, positives: tuple[Ints, Ints], progress: Progress
) -> dict[str, tuple[Ints, Ints]]:
    """Return, by direction, the query of each positive pair and the number of negatives before the positive."""
    first_M, second_M = positives
    multiply = products_on(run.device)

    def products(queries_QP: Floats, candidates_CP: Floats) -> Floats:
        products_QC = multiply(queries_QP, candidates_CP)
        progress.advance(len(queries_QP))
        return products_QC

    there, back = directions(run.modalities)
    progress.start(step, len(first_NP) + len(second_NP), "queries")
    counts = {
        there: (first_M, negatives_before(first_NP, second_NP, (first_M, second_M), products=products)),
        back: (second_M, negatives_before(second_NP, first_NP, (second_M, first_M), products=products)),
    }
    progress.finish()
    return counts
