"""Splits of samples into training, validation and test parts: by near-duplicate groups, by key, or by a column."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedcache.arrays import Floats, Ints, blocks
from embedcache.dataset.inputs import Reader, to_unit_vectors
from embedcache.dataset.pairs import Pairs, caption_languages, name_caches
from embedcache.dataset.settings import KINDS, SplitSettings
from embedcache.errors import CorruptError, DataError, PathError, SettingError, SourceError
from embedcache.files import replacing
from embedcache.metrics.neighbors import iterate_pairs_above
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of each sample of a cache, or of several caches one after another.

    Args:
        keys: keys of the samples, in row order.
        parts: `train`, `val`, `test`, or an empty string for a sample that is left out.
        groups: near-duplicate group of each sample; a group is never divided.
        index_digests: index digest of each sample's cache; empty for a single cache.
    """

    keys: list[str]
    parts: list[str]
    groups: list[int]
    index_digests: list[str] = field(default_factory=list)

    def rows(self, part: str) -> Ints:
        """Return the sample rows of one part, ascending.

        Raises:
            DataError: the part is empty.
        """
        rows = np.flatnonzero(np.array(self.parts) == part)
        if not len(rows):
            counts = ", ".join(f"{name}: {self.parts.count(name)}" for name in PARTS)
            raise DataError(f"the split has no {part} samples ({counts})")
        return rows


def write_split(path: Path, split: Split) -> None:
    """Write a split as Parquet: `row`, `key`, `part`, `group`, and `spine` for several caches."""
    columns = {
        "row": range(len(split.keys)),
        "key": split.keys,
        "part": split.parts,
        "group": split.groups,
    }
    table = pa.table({**columns, "spine": split.index_digests} if split.index_digests else columns)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_split(path: Path, caches: Sequence[Cache]) -> Split:
    """Read the split of all or some of its caches. Samples that were appended to a cache later are in no part.

    Raises:
        PathError: the file does not exist.
        CorruptError: the file is not a split.
        DataError: the split belongs to other samples.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; it is written by embedcache train")
    try:
        columns = read_table(path).to_pydict()
        split = Split(
            keys=columns["key"], parts=columns["part"], groups=columns["group"], index_digests=columns.get("spine", [])
        )
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise CorruptError(f"{path}: expected a split with the columns key, part and group: {error}") from error
    parts = [_select_cache(path, split, cache) for cache in caches]
    if len(parts) == 1:
        return parts[0]
    return Split(
        keys=[key for part in parts for key in part.keys],
        parts=[name for part in parts for name in part.parts],
        groups=[group for part in parts for group in part.groups],
        index_digests=[cache.info.index_digest for cache, part in zip(caches, parts, strict=True) for _ in part.keys],
    )


def _select_cache(path: Path, split: Split, cache: Cache) -> Split:
    """Return the split of one cache, with appended samples in no part."""
    keys = cache.samples["key"].to_pylist()
    rows = [row for row, index_digest in enumerate(split.index_digests) if cache.info.has_rows_of(index_digest)]
    if split.index_digests:
        split = Split(
            keys=[split.keys[row] for row in rows],
            parts=[split.parts[row] for row in rows],
            groups=[split.groups[row] for row in rows],
        )
    if split.keys != keys[: len(split.keys)] or not split.keys:
        raise DataError(
            f"split {path} belongs to other samples: it has {len(split.keys)} keys, {cache.path} has {len(keys)}, and "
            "they differ; use a split of the same samples"
        )
    num_added, first_group = len(keys) - len(split.keys), max(split.groups, default=-1) + 1
    return replace(
        split,
        keys=keys,
        parts=[*split.parts, *[""] * num_added],
        groups=[*split.groups, *range(first_group, first_group + num_added)],
    )


_MAX_STRICT_ITEMS = 200_000
_BLOCK = 1024


def make_split(caches: Sequence[Cache], pairs: Pairs, settings: SplitSettings, readers: Mapping[str, Reader]) -> Split:
    """Split the samples that have both features. The same features and settings give the same split.

    Only a strict split reads the features. Memory: a tile of similarities.

    Args:
        caches: the caches.
        pairs: items of both features, counted across caches.
        settings: settings of the split.
        readers: modality -> reader of its feature, in the order of the pair's sides.

    Raises:
        UnknownNameError: the kind is neither a known one nor a file.
        SettingError: `strict` on more than 200,000 items, since it compares all pairs; or a part is empty.
        SourceError: `column` without a column `split` that names train and test.
    """
    if settings.kind != "strict":
        return split_samples(caches, pairs.samples, settings)
    groups = _near_duplicates(pairs, settings, readers)
    split = _by_groups(_keys_of(caches), pairs.samples, groups, settings)
    _require_parts(split, groups, settings, readers, _languages(caches, pairs, list(readers)))
    return _of_caches(caches, split)


def split_samples(caches: Sequence[Cache], samples: Ints, settings: SplitSettings) -> Split:
    """Split samples without their features: by key, by a column or by a file.

    Args:
        caches: the caches.
        samples: (S,) the samples, counted across caches; the others are in no part.
        settings: settings of the split.

    Raises:
        UnknownNameError, SettingError, SourceError: as in `make_split`.
    """
    keys = _keys_of(caches)
    if settings.kind == "column":
        split = _by_column(caches, keys, samples, settings)
    elif settings.kind == "key":
        split = _by_groups(keys, samples, samples, settings)
        _require_parts(split, samples, settings, ())
    elif settings.path is None or not settings.path.is_file():
        raise unknown_name("split", settings.kind, KINDS, hint="or use the path of another run's split.parquet")
    else:
        split = read_split(settings.path, caches)
    return _of_caches(caches, split)


def _keys_of(caches: Sequence[Cache]) -> list[str]:
    return [key for cache in caches for key in cache.samples["key"].to_pylist()]


def _of_caches(caches: Sequence[Cache], split: Split) -> Split:
    if len(caches) == 1:
        return split
    return replace(
        split, index_digests=[cache.info.index_digest for cache in caches for _ in range(len(cache.samples))]
    )


def _languages(caches: Sequence[Cache], pairs: Pairs, modalities: Sequence[str]) -> list[str]:
    """Return the languages of the captions of some pairs, sorted."""
    if "text" not in modalities:
        return []
    captions = (pairs.first, pairs.second)[modalities.index("text")]
    return sorted({str(name) for name in set(caption_languages(caches)[captions.rows]) if name is not None})


def _require_parts(
    split: Split, groups: Ints, settings: SplitSettings, modalities: Iterable[str], languages: Sequence[str] = ()
) -> None:
    if {"val", "test"} <= set(split.parts):
        return
    if settings.kind == "key":
        raise SettingError(
            f"--split key leaves no validation or test samples among {len(groups)}; raise --val-fraction and "
            "--test-fraction, or use more samples"
        )
    thresholds = [settings.cosine(modality) for modality in modalities]
    named = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in thresholds)
    advice = ""
    if len(languages) > 1:
        advice = (
            f"its captions are in {len(languages)} languages, and an encoder finds captions alike in those that it "
            f"does not know: use --language with one of {', '.join(languages)}, or else "
        )
    raise SettingError(
        f"--split {settings.kind} leaves no validation or test samples among {len(groups)}: the largest near-duplicate "
        f"group has {np.bincount(groups).max()} samples; {advice}raise {named}, or use --split key"
    )


def _by_column(caches: Sequence[Cache], keys: list[str], samples: Ints, settings: SplitSettings) -> Split:
    for cache in caches:
        if "split" not in cache.columns:
            raise SourceError(f"the samples of {cache.path} have no column 'split'; use --split strict or --split key")
    values = [str(value).lower() for cache in caches for value in cache.samples["split"].to_pylist()]
    named_parts = [PART_NAMES.get(value, "") for value in values]
    if not {"train", "test"} <= set(named_parts):
        raise SourceError(
            f"column 'split' of {name_caches(caches)}: expected train and test, got {', '.join(sorted(set(values)))}"
        )
    parts = [""] * len(keys)
    for row in samples:
        parts[row] = named_parts[row]
    if "val" not in parts:
        train = [row for row, part in enumerate(parts) if part == "train"]
        quota = round(settings.val_fraction * len(train))
        validation = take_groups([[row] for row in train], keys, quota, settings.seed)
        parts = ["val" if row in validation else part for row, part in enumerate(parts)]
    return Split(keys=keys, parts=parts, groups=list(range(len(keys))))


def _by_groups(keys: list[str], samples: Ints, groups: Ints, settings: SplitSettings) -> Split:
    members: dict[int, list[int]] = {}
    for sample, group in zip(samples.tolist(), groups.tolist(), strict=True):
        members.setdefault(group, []).append(sample)
    test = take_groups(list(members.values()), keys, round(settings.test_fraction * len(samples)), settings.seed)
    rest = [group for group in members.values() if group[0] not in test]
    val = take_groups(rest, keys, round(settings.val_fraction * len(samples)), settings.seed)
    parts, group_numbers = [""] * len(keys), [-1] * len(keys)
    for number, group in enumerate(members.values()):
        for row in group:
            parts[row] = "test" if row in test else "val" if row in val else "train"
            group_numbers[row] = number
    return Split(keys=keys, parts=parts, groups=group_numbers)


def _near_duplicates(pairs: Pairs, settings: SplitSettings, readers: Mapping[str, Reader]) -> Ints:
    """Return the near-duplicate group of each sample: (S,) int64."""
    num_items = len(pairs.first.rows) + len(pairs.second.rows)
    if num_items > _MAX_STRICT_ITEMS:
        raise SettingError(
            f"--split strict compares all pairs of items: expected at most {_MAX_STRICT_ITEMS:,}, got {num_items:,}; "
            "use --split key or --split column"
        )
    samples = pairs.samples
    labels = np.arange(len(samples))
    for items, (modality, read) in zip((pairs.first, pairs.second), readers.items(), strict=True):
        vectors = np.concatenate(
            [to_unit_vectors(read(items.rows[block])) for block in blocks(len(items.rows), _BLOCK)]
        )
        labels = _merge_groups(vectors, np.searchsorted(samples, items.samples), labels, settings.cosine(modality)[1])
    return labels


def _merge_groups(vectors_ND: Floats, nodes: Ints, labels: Ints, threshold: float) -> Ints:
    """Merge the groups of all nodes with vectors above the threshold: (S,) int64."""
    for row, column in iterate_pairs_above(vectors_ND, threshold):
        left = np.concatenate([labels[nodes[row]], labels])
        right = np.concatenate([labels[nodes[column]], labels])
        size = int(labels.max()) + 1
        edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
        _, component = connected_components(edges, directed=False)
        labels = component[labels].astype(np.int64)
    return labels


PART_NAMES: dict[str, Part] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""Value of a source's column `split`, in lower case -> part."""


def take_groups(groups: Sequence[Sequence[int]], keys: Sequence[str], quota: int, seed: int) -> set[int]:
    """Select complete groups up to a quota of rows, in an order that depends only on keys and seed; return their rows.

    Groups larger than the rest of the quota are skipped.
    """

    def order(group: Sequence[int]) -> bytes:
        return hashlib.sha256(f"{seed}:{min(keys[row] for row in group)}".encode()).digest()

    taken: set[int] = set()
    for group in sorted(groups, key=order):
        if len(taken) + len(group) <= quota:
            taken.update(group)
    return taken
