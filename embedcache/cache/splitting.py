"""Making a split: by near-duplicate groups, by key, or by the source's own column."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedcache.arrays import Array, Ints, blocks, normalize
from embedcache.cache.cache import Cache
from embedcache.cache.pairs import Pairs, name_caches
from embedcache.cache.parts import PART_NAMES, take_groups
from embedcache.cache.side import Reader, mean_vectors
from embedcache.cache.split import Split, read_split
from embedcache.cache.split_settings import SplitSettings
from embedcache.errors import SettingError, SourceError
from embedcache.registry import unknown_name

_KINDS = ("strict", "key", "column")
_MOST_STRICT_ITEMS = 200_000
_BLOCK = 1024


class Paired(Protocol):
    """The two sides of some caches that a split is made for."""

    @property
    def caches(self) -> Sequence[Cache]:
        """The caches; rows and samples are counted on from one to the next."""
        ...

    @property
    def keys(self) -> list[str]:
        """The keys of all samples."""
        ...

    @property
    def read_image(self) -> Reader:
        """Gathers rows of the image side; only `strict` reads them."""
        ...

    @property
    def read_text(self) -> Reader:
        """Gathers rows of the text side."""
        ...


def make_split(data: Paired, pairs: Pairs, settings: SplitSettings) -> Split:
    """Cut the samples that have both sides.

    Deterministic: the same features and settings give the same split. Memory: a tile of similarities.

    Raises:
        UnknownNameError: the kind is neither known nor a file.
        SettingError: `strict` on more than 200,000 items, which compares all pairs; or nothing is held out.
        SourceError: `column` without a usable column.
    """
    split = _cut(data, pairs, settings)
    if len(data.caches) == 1:
        return split
    return replace(split, spines=[cache.info.spine for cache in data.caches for _ in range(cache.info.num_samples)])


def _cut(data: Paired, pairs: Pairs, settings: SplitSettings) -> Split:
    keys = data.keys
    if settings.kind == "column":
        return _by_column(data, pairs.samples, settings)
    if settings.kind in _KINDS:
        groups = _near_duplicates(data, pairs, settings) if settings.kind == "strict" else pairs.samples
        split = _by_groups(keys, pairs.samples, groups, settings)
        _require_parts(split, groups, settings)
        return split
    if not settings.path.is_file():
        raise unknown_name("split", settings.kind, _KINDS, hint="or give the path of another run's split.parquet")
    return read_split(settings.path, data.caches)


def _require_parts(split: Split, groups: Ints, settings: SplitSettings) -> None:
    if {"val", "test"} <= set(split.parts):
        return
    raise SettingError(
        f"--split {settings.kind} leaves nothing to hold out of {len(groups)} samples: the largest group that must "
        f"stay together has {np.bincount(groups).max()}; raise --image-cosine {settings.image_cosine} and "
        f"--text-cosine {settings.text_cosine}, or use --split key"
    )


def _by_column(data: Paired, samples: Ints, settings: SplitSettings) -> Split:
    values = [value for cache in data.caches for value in _split_column(cache)]
    known = [PART_NAMES.get(value, "") for value in values]
    if not {"train", "test"} <= set(known):
        where = name_caches(data.caches)
        raise SourceError(f"column 'split' of {where} holds {sorted(set(values))}; it must name train and test")
    parts = [""] * len(data.keys)
    for row in samples:
        parts[row] = known[row]
    if "val" not in parts:
        parts = _carve_validation(data.keys, parts, settings)
    return Split(keys=data.keys, parts=parts, groups=list(range(len(data.keys))))


def _split_column(cache: Cache) -> list[str]:
    if "split" not in cache.samples.column_names:
        raise SourceError(f"the samples of {cache.path} have no column 'split'; use --split strict or --split key")
    return [str(value).lower() for value in cache.samples["split"].to_pylist()]


def _carve_validation(keys: list[str], parts: list[str], settings: SplitSettings) -> list[str]:
    train = np.array([row for row, part in enumerate(parts) if part == "train"])
    held = take_groups([[int(row)] for row in train], keys, round(settings.val_share * len(train)), settings.seed)
    return ["val" if row in held else part for row, part in enumerate(parts)]


def _by_groups(keys: list[str], samples: Ints, groups: Ints, settings: SplitSettings) -> Split:
    members: dict[int, list[int]] = {}
    for sample, group in zip(samples.tolist(), groups.tolist(), strict=True):
        members.setdefault(group, []).append(sample)
    test = take_groups(list(members.values()), keys, round(settings.test_share * len(samples)), settings.seed)
    rest = [group for group in members.values() if group[0] not in test]
    val = take_groups(rest, keys, round(settings.val_share * len(samples)), settings.seed)
    parts, numbers = [""] * len(keys), [-1] * len(keys)
    for number, group in enumerate(members.values()):
        for row in group:
            parts[row] = "test" if row in test else "val" if row in val else "train"
            numbers[row] = number
    return Split(keys=keys, parts=parts, groups=numbers)


def _near_duplicates(data: Paired, pairs: Pairs, settings: SplitSettings) -> Ints:
    num_items = len(pairs.image.rows) + len(pairs.text.rows)
    if num_items > _MOST_STRICT_ITEMS:
        raise SettingError(
            f"--split strict compares all pairs of items: {num_items} are more than {_MOST_STRICT_ITEMS}; "
            "use --split key or --split column"
        )
    samples = pairs.samples
    labels = np.arange(len(samples))
    for side, read, threshold in (
        (pairs.image, data.read_image, settings.image_cosine),
        (pairs.text, data.read_text, settings.text_cosine),
    ):
        vectors = _vectors(read, side.rows)
        labels = _join(vectors, np.searchsorted(samples, side.samples), labels, threshold)
    return labels


def _vectors(read: Reader, rows: Ints) -> Array:
    """Read one vector of length 1 an item, the mean where it has tokens."""
    return np.concatenate([normalize(mean_vectors(read(rows[block]))) for block in blocks(len(rows), _BLOCK)])


def _join(vectors_ND: Array, nodes: Ints, labels: Ints, threshold: float) -> Ints:
    """Merge the groups of all nodes whose vectors lie above the threshold. One tile of similarities in memory."""
    for block in blocks(len(vectors_ND), _BLOCK):
        row, column = np.nonzero(vectors_ND[block] @ vectors_ND.T > threshold)
        left = np.concatenate([labels[nodes[row + block.start]], labels])
        right = np.concatenate([labels[nodes[column]], labels])
        size = int(labels.max()) + 1
        edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
        _, component = connected_components(edges, directed=False)
        labels = component[labels].astype(np.int64)
    return labels
