"""The samples that encoder pairs are compared on: drawn from a cache, split into parts, grouped into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.pairs import Pairs, pair_items
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import make_split
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.settings import PairsSettings
from embedcache.metrics.intervals import Estimate, chance_estimate
from embedcache.metrics.ranking import chance_recall
from embedcache.store.cache import Cache

MIN_SAMPLES = 20
_NUM_BLOCKS = 50


def draw_samples(
    cache: Cache, images: Sequence[InputFeature], texts: Sequence[InputFeature], settings: PairsSettings
) -> Pairs:
    """Draw samples without replacement from those that have an image and a text with all of the features.

    Raises:
        UnfinishedError, UnknownNameError: as of `pair_items`.
        DataError: fewer than 20 samples have all features.
    """
    pairs = pair_items([cache], images[:1], texts[:1], language=settings.language)
    image, text = (
        items.where(np.logical_and.reduce([feature.valid for feature in features])[items.rows])
        for items, features in ((pairs.image, images), (pairs.text, texts))
    )
    samples = np.intersect1d(image.samples, text.samples)
    if len(samples) < MIN_SAMPLES:
        raise DataError(
            f"expected at least {MIN_SAMPLES} samples of {cache.path} with all of the features, got {len(samples)}: "
            "compare fewer features, or extract more samples"
        )
    if len(samples) > settings.num_samples:
        samples = np.random.default_rng(settings.seed).choice(samples, settings.num_samples, replace=False)
    return Pairs(image=image.select(samples), text=text.select(samples))


@dataclass(frozen=True, kw_only=True)
class PairSample:
    """The compared samples and their parts.

    Args:
        pairs: items of all samples.
        train: items that the probe is fitted on.
        val: items that the probe is measured on.
        groups: (S,) number of the near-duplicate group of each sample, in order of `samples`.
        blocks: (S,) block of each sample, for the jackknife.
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

    def check_k(self, k: int) -> None:
        """Check that k neighbors are not all samples.

        Raises:
            SettingError: k is too large.
        """
        if k >= len(self.samples):
            raise SettingError(f"k: expected less than the {len(self.samples)} compared samples, got {k}")

    def groups_of(self, samples: Ints) -> Ints:
        """Return the groups of some of the samples."""
        groups: Ints = self.groups[np.searchsorted(self.samples, samples)]
        return groups

    def places(self, part: Pairs) -> tuple[Ints, Ints]:
        """Return the positions of the images and texts of a part among those of all samples."""
        return (
            np.searchsorted(self.pairs.image.rows, part.image.rows),
            np.searchsorted(self.pairs.text.rows, part.text.rows),
        )

    def chance(self, k: int) -> dict[str, Estimate]:
        """Compute the recall at k of a random order of the validation items: `i2t` and `t2i`."""
        image_M, text_M = self.val.positives()
        directions = {"i2t": (image_M, self.val.text), "t2i": (text_M, self.val.image)}
        return {
            name: chance_estimate(chance_recall(np.bincount(query_M), len(candidates.rows), k), len(np.unique(query_M)))
            for name, (query_M, candidates) in directions.items()
        }


def split_samples(
    pairs: Pairs, cache: Cache, image: InputFeature, text: InputFeature, settings: SplitSettings
) -> PairSample:
    """Split samples into parts, without the test part.

    Args:
        pairs: items of the samples.
        cache: cache of the samples.
        image: image feature that decides near-duplicates of a strict split.
        text: text feature that decides near-duplicates of a strict split.
        settings: settings of the split.

    Raises:
        DataError: too few samples, or none in a part.
        SettingError, SourceError, UnknownNameError: as of `make_split`.
    """
    split = make_split([cache], pairs, settings, read_image=image.read, read_text=text.read)
    train, val = pairs.select(split.rows("train")), pairs.select(split.rows("val"))
    both = np.union1d(train.samples, val.samples)
    if len(both) < MIN_SAMPLES or not (len(train.samples) and len(val.samples)):
        raise DataError(
            f"expected at least {MIN_SAMPLES} samples in the training and validation parts, some in each, got "
            f"{len(train.samples)} and {len(val.samples)} of {len(pairs.samples)} samples of {cache.path} with all "
            "features: compare fewer features, or use another split"
        )
    groups = np.array(split.groups)[both]
    return PairSample(pairs=pairs.select(both), train=train, val=val, groups=groups, blocks=_blocks(groups))


def _blocks(groups: Ints) -> Ints:
    """Assign whole groups to blocks of about equal size, the largest group first: (S,) block of each sample."""
    _, group_S, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    filled = np.zeros(min(_NUM_BLOCKS, len(sizes)), np.int64)
    block_G = np.empty(len(sizes), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        block_G[group] = filled.argmin()
        filled[block_G[group]] += sizes[group]
    block_S: Ints = block_G[group_S]
    return block_S
