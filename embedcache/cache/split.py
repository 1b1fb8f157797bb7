"""Which samples are for training, validation and test: a table in the run, written down once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Ints
from embedcache.cache.cache import Cache
from embedcache.cache.tables import read_table
from embedcache.disk import replacing
from embedcache.errors import CorruptError, DataError, PathError

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part for each sample of a cache, or of several caches, one after another.

    Args:
        keys: the samples' keys, in row order.
        parts: `train`, `val`, `test`, or `` for a sample left out.
        groups: samples with the same number stay together.
        spines: identity of each sample's cache; none where all are of one.
    """

    keys: list[str]
    parts: list[str]
    groups: list[int]
    spines: list[str] = field(default_factory=list)

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
    """Write a split as Parquet: `row`, `key`, `part`, `group`, and `spine` where it is of several caches."""
    columns = {
        "row": range(len(split.keys)),
        "key": split.keys,
        "part": split.parts,
        "group": split.groups,
    }
    table = pa.table({**columns, "spine": split.spines} if split.spines else columns)
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
            keys=columns["key"], parts=columns["part"], groups=columns["group"], spines=columns.get("spine", [])
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
        spines=[cache.info.spine for cache, part in zip(caches, parts, strict=True) for _ in part.keys],
    )


def spread_split(split: Split, cache: Cache, column: str) -> Split:
    """Give each sample of another cache the part of the sample that it was made of.

    Args:
        split: of the samples whose keys the column holds.
        cache: such as the source `pairs` makes, which keeps that key in the column `sample`.
        column: of the cache's samples. A key in it that the split does not hold is in no part.

    Raises:
        DataError: the cache has no such column, or none of its keys is in the split.
    """
    if column not in cache.columns:
        raise DataError(f"{cache.path} has no column {column!r} to find the samples of the split by")
    row_of = {key: row for row, key in enumerate(split.keys)}
    rows = [row_of.get(key) for key in cache.samples[column].to_pylist()]
    if all(row is None for row in rows):
        raise DataError(f"no key in column {column!r} of {cache.path} is in the split, which has {len(row_of):,}")
    first_new = max(split.groups, default=-1) + 1
    return Split(
        keys=cache.samples["key"].to_pylist(),
        parts=["" if row is None else split.parts[row] for row in rows],
        groups=[first_new + number if row is None else split.groups[row] for number, row in enumerate(rows)],
    )


def swap_parts(split: Split, one: Part, other: Part) -> Split:
    """Give the samples of two parts each other's part: to train on what was held out."""
    swapped = {one: other, other: one}
    return replace(split, parts=[swapped.get(part, part) for part in split.parts])  # type: ignore[call-overload]


def _of_cache(path: Path, split: Split, cache: Cache) -> Split:
    """Give the part of a split that is of one cache's samples, longer by those that were added since."""
    keys = cache.samples["key"].to_pylist()
    rows = [row for row, spine in enumerate(split.spines) if cache.info.has_rows_of(spine)]
    if split.spines:
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
