"""Image-text retrieval of trained runs, from the cache alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.artifact import check_same, digest_file
from embedcache.cache.cache import Cache
from embedcache.cache.pairs import Pairs, pair_items
from embedcache.cache.side import SideFeature, open_side
from embedcache.cache.split import Split, read_split
from embedcache.errors import CorruptError, DataError, FingerprintError, SettingError
from embedcache.metrics.intervals import Estimate, bootstrap_mean, chance_estimate
from embedcache.metrics.ranks import best_ranks, chance_recall
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, check_feature, load_pair, project, split_path

KS = (1, 5, 10)
WAYS = ("i2t", "t2i")


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """One run on one part: every query's rank, and what is needed to look at its neighbours.

    Args:
        seed: of the run.
        pairs: the items of the part.
        groups: (S,) int64, a number for each sample of the cache; near-duplicates share one.
        images: (I, P) float32, rows of length 1, in the order of `pairs.image`.
        texts: (T, P) alike, of `pairs.text`.
        positives: two (M,) arrays: image i and text j of each positive pair.
        ranks: `i2t` (I,) and `t2i` (T,): rank of the best positive among all candidates, 1 is the top.
        overlap: samples of the part whose image or caption is also, byte for byte, in the training part.
    """

    seed: int
    pairs: Pairs
    groups: Ints
    images: Floats
    texts: Floats
    positives: tuple[Ints, Ints]
    ranks: dict[str, Ints]
    overlap: int


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recalls of one or several runs, with what chance gives on the same items.

    Args:
        part: which part of the split.
        recalls: way -> `r@k` -> mean over runs and queries, with a 95 % interval from resampling the split's groups.
        chance: alike, of a random order: its expectation, and where 95 % of random orders lie.
        num_images: per run.
        num_texts: per run.
        seeds: of the runs.
        overlap: the most of any run's.
    """

    part: str
    recalls: dict[str, dict[str, Estimate]]
    chance: dict[str, dict[str, Estimate]]
    num_images: list[int]
    num_texts: list[int]
    seeds: list[int]
    overlap: int

    def line(self) -> str:
        """Say what was measured, in one line, and warn where the part is not held out."""
        counts = f"{self.num_images[0]:,} images, {self.num_texts[0]:,} captions"
        seeds = ", ".join(map(str, self.seeds))
        leak = (
            f"; WARNING: {self.overlap:,} samples share an image or a caption with the training part"
            if self.overlap
            else ""
        )
        return f"part {self.part}: {counts} a run; seeds {seeds}; 95 % intervals over groups of near-duplicates{leak}"


def evaluate_retrieval(
    cache_path: Path | str,
    run_paths: Sequence[Path | str],
    *,
    part: str = "test",
    language: str | None = None,
    is_control: bool = False,
) -> RetrievalReport:
    """Rank the held-out items of a cache with trained runs.

    Several runs (seeds) are averaged; all must have been trained on the same features. Memory: the part's features
    and tiles of similarities.

    Args:
        cache_path: the cache.
        run_paths: runs trained on it.
        part: `test`, `val` or `train`.
        language: captions of this language; None is the language that the run was trained on.
        is_control: the runs must have been trained on shuffled pairs.

    Raises:
        SettingError: no run, two of one seed, or a control that was not trained on shuffled pairs.
        FingerprintError: a run was trained on another encoder's features, on other samples, or unlike the others.
        DataError: the part is empty.
    """
    cache = Cache(cache_path)
    if not run_paths:
        raise SettingError("no run to evaluate; give at least one run folder")
    loaded = [load_pair(Path(path)) for path in run_paths]
    if is_control and not all(config.training["shuffle_pairs"] for _, config in loaded):
        raise SettingError("a control must be trained with --shuffle-pairs; one of these runs was not")
    _refuse_mixed([config for _, config in loaded], run_paths)
    rankings = [
        rank(cache, Path(path), pair, config, part=part, language=language)
        for path, (pair, config) in zip(run_paths, loaded, strict=True)
    ]
    return RetrievalReport(
        part=part,
        recalls=_recalls(rankings),
        chance=_chances(rankings),
        num_images=[len(ranking.images) for ranking in rankings],
        num_texts=[len(ranking.texts) for ranking in rankings],
        seeds=[ranking.seed for ranking in rankings],
        overlap=max(ranking.overlap for ranking in rankings),
    )


def rank(
    cache: Cache,
    run_path: Path,
    pair: AlignedPair,
    config: PairConfig,
    *,
    part: str,
    language: str | None = None,
) -> Ranking:
    """Project and rank one part of a cache with one run, both ways.

    Raises:
        FingerprintError: the run was trained on other features or samples.
        DataError: the part is empty.
    """
    image, text, all_pairs = _trained_pairs(cache, config, language)
    split = _split_of(cache, run_path, config)
    pairs = all_pairs.of(split.rows(part))
    if not len(pairs.samples):
        raise DataError(f"part {part} of {run_path} has no sample with both features")
    trained = np.flatnonzero(np.array(split.parts) == "train")  # none, where the other caches of a run hold them all
    images = project(pair.image, image.read(pairs.image.rows))
    texts = project(pair.text, text.read(pairs.text.rows))
    image_M, text_M = pairs.positives()
    return Ranking(
        seed=int(config.training["seed"]),
        pairs=pairs,
        groups=np.array(split.groups),
        images=images,
        texts=texts,
        positives=(image_M, text_M),
        ranks={
            "i2t": best_ranks(images, texts, (image_M, text_M)),
            "t2i": best_ranks(texts, images, (text_M, image_M)),
        },
        overlap=0 if part == "train" else _overlap(pairs, all_pairs.of(trained)),
    )


def _split_of(cache: Cache, run_path: Path, config: PairConfig) -> Split:
    path = split_path(run_path)
    if not path.is_file() or digest_file(path) != config.split:
        raise CorruptError(
            f"{path} is missing or not the split that the run was trained on; train again into a new folder"
        )
    return read_split(path, [cache])


def _trained_pairs(cache: Cache, config: PairConfig, language: str | None) -> tuple[SideFeature, SideFeature, Pairs]:
    if not any(map(cache.info.has_rows_of, config.spine.split("+"))):
        raise FingerprintError(
            f"the run was trained on other samples than those of {cache.path}; give the cache it was trained on"
        )
    image, text = trained_side(cache, config, "image"), trained_side(cache, config, "text")
    return (
        image,
        text,
        pair_items([cache], [image], [text], language=language or config.training["language"]),
    )


def trained_side(cache: Cache, config: PairConfig, modality: str) -> SideFeature:
    """Get what one side of a run was trained on.

    Raises:
        UnknownNameError: the cache has no feature of that name.
        FingerprintError: another encoder made it.
    """
    side = open_side(cache, modality, config.side(modality).feature)
    check_feature(config, modality, side.name, side.fingerprint)
    return side


def _refuse_mixed(configs: Sequence[PairConfig], run_paths: Sequence[Path | str]) -> None:
    """Refuse to average runs that differ in more than their seeds."""
    first = _without_seeds(configs[0])
    seeds = [config.training["seed"] for config in configs]
    if len(set(seeds)) < len(seeds):
        raise SettingError(f"runs to average must differ in their seed; these have {', '.join(map(str, seeds))}")
    for path, config in zip(run_paths[1:], configs[1:], strict=True):
        next_step = f"average only seeds of one recipe: evaluate {run_paths[0]} and {path} one by one"
        check_same(f"run {run_paths[0]}", first, _without_seeds(config), next_step=next_step)


def _without_seeds(config: PairConfig) -> dict[str, Any]:
    split = {**config.training["split"], "seed": None}
    return {
        "image": config.image.feature,
        "text": config.text.feature,
        "spine": config.spine,
        "training": {**config.training, "seed": None, "split": split},
    }


def _recalls(rankings: Sequence[Ranking]) -> dict[str, dict[str, Estimate]]:
    recalls: dict[str, dict[str, Estimate]] = {}
    for way in WAYS:
        ranks = np.concatenate([ranking.ranks[way] for ranking in rankings])
        groups = np.concatenate([ranking.groups[_queries(ranking, way)] for ranking in rankings])
        recalls[way] = {f"r@{k}": bootstrap_mean(ranks <= k, groups) for k in KS}
    return recalls


def _queries(ranking: Ranking, way: str) -> Ints:
    return (ranking.pairs.image if way == "i2t" else ranking.pairs.text).samples


def _chances(rankings: Sequence[Ranking]) -> dict[str, dict[str, Estimate]]:
    return {way: {f"r@{k}": _chance(rankings, way, k) for k in KS} for way in WAYS}


def _chance(rankings: Sequence[Ranking], way: str, k: int) -> Estimate:
    expected, num_queries = [], 0
    for ranking in rankings:
        query_M = ranking.positives[WAYS.index(way)]
        num_candidates = len(ranking.texts if way == "i2t" else ranking.images)
        expected.append(chance_recall(np.bincount(query_M), num_candidates, k))
        num_queries += len(ranking.ranks[way])
    return chance_estimate(float(np.mean(expected)), num_queries)


def _overlap(held: Pairs, trained: Pairs) -> int:
    """Count held-out samples whose image bytes or caption are in the training part too."""
    seen = [
        side.samples[np.isin(side.contents, other.contents)]
        for side, other in ((held.image, trained.image), (held.text, trained.text))
    ]
    return len(np.unique(np.concatenate(seen)))
