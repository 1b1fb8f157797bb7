"""Which samples are for training, validation and test: a table in the run, written down once.

Making a split: by near-duplicate groups, by key, or by the source's own column.

Cutting samples into parts: what splits of pairs and of labeled items share.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedcache.arrays import Floats, Ints, blocks
from embedcache.dataset.inputs import Reader, unit_vectors
from embedcache.dataset.pairs import Pairs, name_caches
from embedcache.dataset.settings import KINDS, SplitSettings
from embedcache.errors import CorruptError, DataError, PathError, SettingError, SourceError
from embedcache.files import replacing
from embedcache.metrics.neighbors import pairs_above
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part for each sample of a cache, or of several caches, one after another.

    Args:
        keys: the samples' keys, in row order.
        parts: `train`, `val`, `test`, or `` for a sample left out.
        groups: samples with the same number stay together.
        index_digests: identity of each sample's cache; none where all are of one.
    """

    keys: list[str]
    parts: list[str]
    groups: list[int]
    index_digests: list[str] = field(default_factory=list)

    def rows(self, part: str) -> Ints:
        """Get the sample rows of one part, ascending.

        Raises:
            DataError: there are none.
        """
        rows = np.flatnonzero(np.array(self.parts) == part)
        if not len(rows):
            counts = ", ".join(f"{name}: {self.parts.count(name)}" for name in PARTS)
            raise DataError(f"the split has no {part} samples ({counts})")
        return rows


def write_split(path: Path, split: Split) -> None:
    """Write a split as Parquet: `row`, `key`, `part`, `group`, and `index_digest` where it is of several caches."""
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
    """Read a split of some caches' samples. Those that were added to a cache since are in no part.

    Args:
        path: what `write_split` wrote.
        caches: of all whose samples it holds, or some.

    Raises:
        PathError: there is no such file.
        CorruptError: it is no split.
        DataError: it is of other samples.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; it is written by embedcache train")
    try:
        columns = read_table(path).to_pydict()
        found = Split(
            keys=columns["key"], parts=columns["part"], groups=columns["group"], index_digests=columns.get("spine", [])
        )
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise CorruptError(f"{path} is no split: {error}") from error
    parts = [_of_cache(path, found, cache) for cache in caches]
    if len(parts) == 1:
        return parts[0]
    return Split(
        keys=[key for part in parts for key in part.keys],
        parts=[name for part in parts for name in part.parts],
        groups=[group for part in parts for group in part.groups],
        index_digests=[cache.info.index_digest for cache, part in zip(caches, parts, strict=True) for _ in part.keys],
    )


def _of_cache(path: Path, split: Split, cache: Cache) -> Split:
    """Give the part of a split that is of one cache's samples, longer by those that were added since."""
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
            f"split {path} is of other samples: it has {len(split.keys)} keys, {cache.path} has {len(keys)}, and they "
            "differ"
        )
    num_added, first_group = len(keys) - len(split.keys), max(split.groups, default=-1) + 1
    return replace(
        split,
        keys=keys,
        parts=[*split.parts, *[""] * num_added],
        groups=[*split.groups, *range(first_group, first_group + num_added)],
    )


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
    return replace(
        split, index_digests=[cache.info.index_digest for cache in data.caches for _ in range(cache.info.num_samples)]
    )


def _cut(data: Paired, pairs: Pairs, settings: SplitSettings) -> Split:
    keys = data.keys
    if settings.kind == "column":
        return _by_column(data, pairs.samples, settings)
    if settings.kind in KINDS:
        groups = _near_duplicates(data, pairs, settings) if settings.kind == "strict" else pairs.samples
        split = _by_groups(keys, pairs.samples, groups, settings)
        _require_parts(split, groups, settings)
        return split
    if settings.path is None or not settings.path.is_file():
        raise unknown_name("split", settings.kind, KINDS, hint="or give the path of another run's split.parquet")
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
    held = take_groups([[int(row)] for row in train], keys, round(settings.val_fraction * len(train)), settings.seed)
    return ["val" if row in held else part for row, part in enumerate(parts)]


def _by_groups(keys: list[str], samples: Ints, groups: Ints, settings: SplitSettings) -> Split:
    members: dict[int, list[int]] = {}
    for sample, group in zip(samples.tolist(), groups.tolist(), strict=True):
        members.setdefault(group, []).append(sample)
    test = take_groups(list(members.values()), keys, round(settings.test_fraction * len(samples)), settings.seed)
    rest = [group for group in members.values() if group[0] not in test]
    val = take_groups(rest, keys, round(settings.val_fraction * len(samples)), settings.seed)
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
        vectors = np.concatenate([unit_vectors(read(side.rows[block])) for block in blocks(len(side.rows), _BLOCK)])
        labels = _merge_groups(vectors, np.searchsorted(samples, side.samples), labels, threshold)
    return labels


def _merge_groups(vectors_ND: Floats, nodes: Ints, labels: Ints, threshold: float) -> Ints:
    """Merge the groups of all nodes with vectors above the threshold: (S,) int64."""
    for row, column in pairs_above(vectors_ND, threshold):
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
"""What a source's column `split` may say, in lower case, and the part it means."""


def take_groups(groups: Sequence[Sequence[int]], keys: Sequence[str], quota: int, seed: int) -> set[int]:
    """Take whole groups in an order that only keys and the seed decide; one too large for what is left is passed by.

    Args:
        groups: rows that must stay together, none of them empty.
        keys: the key of each row.
        quota: rows to take at most.
        seed: which of the possible orders.

    Returns:
        The rows of the groups taken.
    """

    def order(group: Sequence[int]) -> bytes:
        return hashlib.sha256(f"{seed}:{min(keys[row] for row in group)}".encode()).digest()

    taken: set[int] = set()
    for group in sorted(groups, key=order):
        if len(taken) + len(group) <= quota:
            taken.update(group)
    return taken
