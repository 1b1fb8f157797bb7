"""Retrieval between the two modalities of trained runs, such as images and texts, on cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from embedcache.arrays import Ints
from embedcache.evaluate.overlap import Overlap, largest_overlap
from embedcache.evaluate.ranking import Ranking, rank, ranked_language
from embedcache.evaluate.runs import RunPaths, iterate_recipes, load_runs, report_line
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
from embedcache.metrics.ranking import recall_at, tied_chance_recall
from embedcache.modalities import directions, pair_nouns
from embedcache.progress import AnyProgress, to_progress
from embedcache.settings import merge_settings, replace_fields
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import RetrievalOptions

KS = (1, 5, 10)
_MAX_K = 100


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

    def __repr__(self) -> str:
        """Return `line`, and below it the recalls of each direction with those of chance, for notebooks and `print`."""
        lines = [self.line()]
        for direction, recalls in self.recalls.items():
            chances = self.chance[direction]
            values = (f"R@{k} {recalls[f'r@{k}']}, chance {chances[f'r@{k}'].value:.3f}" for k in KS)
            lines.append(f"{direction}: {'; '.join(values)}")
        return "\n".join(lines)

    def line(self) -> str:
        """Summarize what was measured in one line, with a warning if the part overlaps with the training part."""
        of_language = f" in {self.language}" if self.language else ""
        nouns = pair_nouns(tuple(self.num_items))
        counts = ", ".join(f"{num[0]:,} {name}" for num, name in zip(self.num_items.values(), nouns, strict=True))
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
    cache: AnyPath,
    run: RunPaths,
    settings: RetrievalSettings | None = None,
    *,
    is_control: bool = False,
    progress: AnyProgress = None,
    **options: Unpack["RetrievalOptions"],
) -> RetrievalReport:
    """Rank the items of one part of a cache with a run, or with the seeds of one recipe, which are averaged.

    The cache may be one that the runs were trained on, or any other with features of the same encoders. Of a part with
    more than `max_samples` samples as many are drawn, the same for every run. Memory: the features of the ranked
    samples, tiles of similarities, and about 270 bytes per sample of the cache, whose items are paired.

    Args:
        cache: the cache.
        run: one run, or seeds of one recipe.
        settings: part, language and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        is_control: require that the runs were trained on shuffled pairs.
        progress: progress in queries.

    Raises:
        SettingError: no run, two of one seed, a control that was not trained on shuffled pairs, several languages, or a
            width above that of the shared space.
        FingerprintError: a run was trained on features from another encoder, or with another recipe than the others.
        DataError: the part is empty.
    """
    settings = merge_settings(RetrievalSettings, settings, options)
    progress = to_progress(progress)
    cache, runs = Cache(cache), load_runs(run, is_control=is_control, device=settings.device)
    rankings = [rank(cache, run, settings, progress=progress) for run in runs]
    modalities = runs[0].modalities
    both = directions(modalities)
    recalls = {direction: _recalls(rankings, direction) for direction in both}
    has_repeats = any(ranking.distinct for ranking in rankings)
    distinct = [ranking.distinct or ranking for ranking in rankings] if has_repeats else []
    return RetrievalReport(
        part=rankings[0].part,
        language=ranked_language(runs[0], settings),
        recalls=recalls,
        rank_metrics={direction: _rank_metrics(rankings, direction) for direction in both},
        curves={direction: _recall_curve(rankings, direction) for direction in both},
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
    cache: AnyPath,
    run: RunPaths,
    settings: RetrievalSettings | None = None,
    *,
    control_run: RunPaths = (),
    progress: AnyProgress = None,
    **options: Unpack["RetrievalOptions"],
) -> dict[str, RetrievalReport]:
    """Evaluate several recipes, each in every language of the settings; seeds of one recipe are averaged.

    Args:
        cache: the cache.
        run: runs of any recipes.
        settings: part, languages and overlap check.
        options: settings by their names on the command line, which replace those of `settings`.
        control_run: runs trained on shuffled pairs.
        progress: progress in queries.

    Returns:
        Name of the recipe, with the language if there are several -> report.
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


def _ranks(rankings: Sequence[Ranking], direction: str) -> Ints:
    """Concatenate the ranks of the queries of all runs: (Q,)."""
    return np.concatenate([ranking.ranks[direction] for ranking in rankings])


def _recalls(rankings: Sequence[Ranking], direction: str) -> dict[str, Estimate]:
    hits_QK = _ranks(rankings, direction)[:, None] <= np.array(KS)
    recalls = bootstrap_means(hits_QK, _groups(rankings, direction))
    return {f"r@{k}": estimate for k, estimate in zip(KS, recalls, strict=True)}


def _rank_metrics(rankings: Sequence[Ranking], direction: str) -> dict[str, Estimate]:
    """Estimate mean average precision and median rank over the queries of all runs."""
    precisions_Q = np.concatenate([ranking.average_precisions[direction] for ranking in rankings])
    groups = _groups(rankings, direction)
    return {
        "map": bootstrap_means(precisions_Q[:, None], groups)[0],
        "median_rank": bootstrap_median(_ranks(rankings, direction), groups),
    }


def _recall_curve(rankings: Sequence[Ranking], direction: str) -> list[float]:
    """Compute recall@k for k from 1 to at most `_MAX_K`."""
    ranks_Q = _ranks(rankings, direction)
    num_candidates = max(ranking.num_candidates(direction) for ranking in rankings)
    return [float(np.mean(ranks_Q <= k)) for k in range(1, min(_MAX_K, num_candidates) + 1)]


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
    num_queries = sum(effective_number(ranking.sides(direction)[0].contents) for ranking in rankings)
    return chance_estimate(float(np.mean([chance_at(ranking, direction, k) for ranking in rankings])), num_queries)


def chance_at(ranking: Ranking, direction: str, k: int) -> float:
    """Compute the expected recall at k of random vectors, equal ones of equal items."""
    positives = ranking.positives if ranking.is_forward(direction) else ranking.positives[::-1]
    return tied_chance_recall(positives, ranking.sides(direction)[1].contents, k)
