"""What encoder pairs are compared on: the features of a cache, and the samples that have all of them, in parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Ints, distinct
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.pairs import Pairs, pair_items
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splitting import make_split
from embedcache.errors import DataError, UnfinishedError
from embedcache.evaluate.settings import PairsSettings
from embedcache.metrics.intervals import Estimate, chance_estimate, effective_number
from embedcache.metrics.ranking import chance_recall
from embedcache.modalities import option_of
from embedcache.progress import Progress
from embedcache.store.cache import Cache

_MIN_SAMPLES = 20
_NUM_BLOCKS = 50


def open_features(cache: Cache, modality: str, names: Sequence[str]) -> tuple[list[InputFeature], list[str]]:
    """Open the named features, or all complete ones that no run computed, and return a line for each one left out."""
    if names:
        named = {feature.name: feature for feature in (open_input(cache, modality, name) for name in names)}
        for feature in named.values():
            feature.require_complete()
        return list(named.values()), []
    stored = cache.features(modality)
    if not stored:
        open_input(cache, modality)  # raises, with the command that extracts some
    complete, skipped = [], []
    for stored_feature in stored:
        if stored_feature.group.is_from_run:  # which was trained on these samples
            name = stored_feature.name
            option = option_of(modality, "feature", name)
            skipped.append(f"left out: {name} was computed by a run; {option} compares it")
            continue
        feature = InputFeature([stored_feature])
        try:
            feature.require_complete()
            complete.append(feature)
        except UnfinishedError as error:
            skipped.append(f"left out: {error}")
    if skipped and not complete:
        raise UnfinishedError(
            f"{cache.path}: expected a complete {modality} feature, got none; {skipped[0].partition(': ')[2]}"
        )
    return complete, skipped


def draw_samples(
    cache: Cache,
    first_features: Sequence[InputFeature],
    second_features: Sequence[InputFeature],
    settings: PairsSettings,
) -> Pairs:
    """Draw samples without replacement from those that have an item of each modality with all of its features."""
    pairs = pair_items([cache], first_features[:1], second_features[:1], language=settings.language)
    first, second = (
        items.where(np.logical_and.reduce([feature.valid for feature in features])[items.rows])
        for items, features in ((pairs.first, first_features), (pairs.second, second_features))
    )
    samples = np.intersect1d(distinct(first.samples), distinct(second.samples), assume_unique=True)
    if len(samples) < _MIN_SAMPLES:
        raise DataError(
            f"expected at least {_MIN_SAMPLES} samples of {cache.path} with all of the features, got {len(samples)}: "
            "compare fewer features, or extract more samples"
        )
    if len(samples) > settings.num_samples:
        samples = np.random.default_rng(settings.seed).choice(samples, settings.num_samples, replace=False)
    return Pairs(first=first.select(samples), second=second.select(samples))


@dataclass(frozen=True, kw_only=True)
class PairSample:
    """The compared samples: all pairs, those that the probe is fitted on, and those that it is measured on.

    `groups` and `blocks` are (S,): the near-duplicate group and the jackknife block of each of `samples`.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    groups: Ints
    blocks: Ints

    @property
    def samples(self) -> Ints:
        """(S,) int64 rows of the sample table, ascending."""
        return self.pairs.samples

    def groups_of(self, samples: Ints) -> Ints:
        """Return the groups of some of the samples."""
        groups: Ints = self.groups[np.searchsorted(self.samples, samples)]
        return groups

    def positions(self, part: Pairs) -> tuple[Ints, Ints]:
        """Return the positions of the items of both modalities of a part among those of all samples."""
        return (
            np.searchsorted(self.pairs.first.rows, part.first.rows),
            np.searchsorted(self.pairs.second.rows, part.second.rows),
        )

    def chance(self, k: int) -> list[Estimate]:
        """Compute the recall at k of a random order of the validation items, in both directions."""
        first_M, second_M = self.val.positives()
        first, second = self.val.first, self.val.second
        return [
            chance_estimate(
                chance_recall(np.bincount(query_M), len(candidates.rows), k), effective_number(queries.contents)
            )
            for query_M, queries, candidates in ((first_M, first, second), (second_M, second, first))
        ]


def split_samples(
    pairs: Pairs, cache: Cache, features: Sequence[InputFeature], settings: SplitSettings, progress: Progress
) -> PairSample:
    """Split samples into parts, without the test part; the two features decide near-duplicates of a strict split."""
    split = make_split(
        [cache], pairs, settings, {feature.modality: feature.read for feature in features}, progress=progress
    )
    train, val = pairs.select(split.rows("train")), pairs.select(split.rows("val"))
    both = distinct(np.concatenate([train.samples, val.samples]))
    if len(both) < _MIN_SAMPLES or not (len(train.samples) and len(val.samples)):
        raise DataError(
            f"expected at least {_MIN_SAMPLES} samples in the training and validation parts, some in each, got "
            f"{len(train.samples)} and {len(val.samples)} of {len(pairs.samples)} drawn samples of {cache.path}: draw "
            "more with --num-samples, compare fewer features, or use another split"
        )
    groups = np.array(split.groups)[both]
    return PairSample(pairs=pairs.select(both), train=train, val=val, groups=groups, blocks=_assign_blocks(groups))


def _assign_blocks(groups: Ints) -> Ints:
    """Assign whole groups to blocks of about equal size, the largest group first: (S,) block of each sample."""
    _, group_S, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    filled = np.zeros(min(_NUM_BLOCKS, len(sizes)), np.int64)
    block_G = np.empty(len(sizes), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        block_G[group] = filled.argmin()
        filled[block_G[group]] += sizes[group]
    block_S: Ints = block_G[group_S]
    return block_S
