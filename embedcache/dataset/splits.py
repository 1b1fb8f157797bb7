"""Splits of samples into training, validation and test parts, and the files that they are written to and read from."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache as cache_calls
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Bools, Ints
from embedcache.dataset.pairs import name_caches
from embedcache.errors import CorruptError, DataError, PathError
from embedcache.files import reading, replacing
from embedcache.outputs import to_metadata
from embedcache.progress import NullProgress, Progress, watch
from embedcache.provenance import digest_file, read_record
from embedcache.store.cache import Cache
from embedcache.store.columns import Column, in_blocks, to_array
from embedcache.store.rows import iterate_keys, key_column
from embedcache.store.tables import BLOCK, add_footer_checksum, iterate_table

_log = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
PART_NAMES: dict[str, Part] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""Value of a source's column `split`, in lower case -> part."""

_COLUMNS = pa.schema(
    [("key", pa.string()), ("part", pa.string()), ("group", pa.int64()), ("index_digest", pa.string())]
)
_ROWS_PER_GROUP = 2**20  # as Arrow divides a table: the bytes are those of a table that is written as a whole
_MANIFESTS = ("config.json", "study.json")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of each sample of a cache, or of several caches one after another.

    Args:
        keys: keys of the samples, in row order.
        parts: `train`, `val`, `test`, or an empty string for a sample that is left out.
        groups: near-duplicate group of each sample; a group is never divided.
        index_digests: index digest of each sample's cache; empty for a single cache.
    """

    keys: Sequence[str]
    parts: Sequence[str]
    groups: Sequence[int]
    index_digests: Sequence[str] = ()

    @classmethod
    def of_caches(cls, caches: Sequence[Cache], parts: Column[str], groups: Column[int]) -> "Split":
        """Return the split of all samples of some caches, one after another; their keys are read when they are used."""
        return cls(keys=key_column(caches), parts=parts, groups=groups, index_digests=_index_digests(caches))

    def mask(self, part: str) -> Bools:
        """Return whether each sample is in a part: (S,) bool."""
        is_in_part: Bools = pc.equal(to_array(self.parts, pa.string()), part).to_numpy(zero_copy_only=False)
        return is_in_part

    def rows(self, part: str) -> Ints:
        """Return the sample rows of one part, ascending.

        Raises:
            DataError: the part is empty.
        """
        rows = np.flatnonzero(self.mask(part))
        if not len(rows):
            counts = ", ".join(f"{name}: {self.parts.count(name)}" for name in PARTS)
            raise DataError(f"the split has no {part} samples ({counts})")
        return rows


def _index_digests(caches: Sequence[Cache]) -> Sequence[str]:
    """Return the index digest of each sample's cache; none for a single cache."""
    if len(caches) == 1:
        return ()
    which_S = np.repeat(np.arange(len(caches), dtype=np.int32), list(map(len, caches)))
    return Column(pa.DictionaryArray.from_arrays(which_S, [cache.info.index_digest for cache in caches]))


def write_split(path: Path, split: Split) -> None:
    """Write a split as Parquet: `row`, `key`, `part`, `group`, and of several caches `index_digest`.

    Memory: a million rows.
    """
    values: dict[str, Sequence[object]] = {"key": split.keys, "part": split.parts, "group": split.groups}
    if split.index_digests:
        values["index_digest"] = split.index_digests
    schema = pa.schema([pa.field("row", pa.int64()), *(_COLUMNS.field(name) for name in values)])
    schema, first = schema.with_metadata(to_metadata({}, schema)), 0
    columns = [in_blocks(of, _COLUMNS.field(name).type, _ROWS_PER_GROUP) for name, of in values.items()]
    with replacing(path) as temporary:
        with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
            while block := [part for column in columns for part in islice(column, 1)]:
                writer.write_table(pa.table([np.arange(first, first + len(block[0])), *block], schema=schema))
                first += len(block[0])
                del block  # not kept while the next one is read
        add_footer_checksum(temporary)


def check_split(path: Path) -> None:
    """Compare a split with its digest in the `config.json` of its run, or the `study.json` of its study, if any.

    Raises:
        CorruptError: the split is missing, or it or that file has changed since it was written.
    """
    for name in _MANIFESTS if path.name == "split.parquet" else ():
        if (manifest := path.with_name(name)).is_file():
            written = read_record(manifest, next_step="restore the file").get("split_digest")
            if isinstance(written, str) and written and not (path.is_file() and digest_file(path) == written):
                got = "another file" if path.is_file() else "none"
                raise CorruptError(
                    f"{path}: expected the split that {manifest.name} was written for, got {got}; restore it, or use "
                    "a new folder"
                )


def require_split(path: Path) -> None:
    """Check that a file exists and, as `check_split` does, that it is the split of its run.

    Raises:
        PathError: there is no such file.
        CorruptError: it has changed since it was written.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing"
        raise PathError(f"{path}: expected the split.parquet of a run, got {got}; embedcache train writes one")
    check_split(path)


def read_split(path: Path, caches: Sequence[Cache], *, progress: Progress | None = None) -> Split:
    """Read the split of all or some of its caches. Samples that were appended to a cache later are in no part.

    Nor are those that were removed from it since, of which a warning tells the number.

    Args:
        path: the file; of a finished run or of a study, it is compared with its digest.
        caches: caches whose samples are returned, one after another.
        progress: progress in rows of the file.

    Raises:
        PathError: there is no such file.
        CorruptError: the file is not a split, or has changed since it was written.
        DataError: the split belongs to other samples, or all of its samples were removed.
    """
    require_split(path)
    of_caches = [_CacheRows(path, cache) for cache in caches]
    blocks = watch(_iterate_rows(path), progress or NullProgress(), "reading the split", sum(map(len, caches)), "rows")
    for rows in blocks:
        for of_cache in of_caches:
            of_cache.add(rows)
    joined = pa.concat_tables([of_cache.close() for of_cache in of_caches]).combine_chunks()
    if not any(of_cache.has_samples for of_cache in of_caches):  # their keys are gone: it may be of other samples
        raise DataError(
            f"split {path}: expected samples of {name_caches(caches)}, got only removed ones; make a new split"
        )
    return Split.of_caches(caches, Column(joined["part"]), Column(joined["group"]))


def _iterate_rows(path: Path) -> Iterator[pa.Table]:
    """Iterate over the rows of a split: key, part, group and, of several caches, index_digest. Memory: a block."""
    with reading(path, "expected a split with the columns key, part and group"):
        for table in iterate_table(path, BLOCK, _COLUMNS.names):
            schema = _COLUMNS if "index_digest" in table.column_names else _COLUMNS.remove(len(_COLUMNS) - 1)
            yield table.select(schema.names).cast(schema)


class _CacheRows:
    """The rows of a split that belong to one cache, whose keys are compared block by block."""

    def __init__(self, path: Path, cache: Cache) -> None:
        self._path, self._cache, self._keys = path, cache, iterate_keys(cache)
        self._ahead = pa.chunked_array([], pa.string())  # keys that were read and not compared yet
        self._rows: list[pa.Table] = []
        self._num_rows, self._num_removed, self._is_same = 0, 0, True

    def add(self, rows: pa.Table) -> None:
        """Compare the next rows of the split, some of which may belong to other caches."""
        if "index_digest" in rows.column_names:
            same = [name for name in pc.unique(rows["index_digest"]).to_pylist() if self._cache.info.has_rows_of(name)]
            rows = rows.filter(pc.is_in(rows["index_digest"], value_set=pa.array(same, pa.string())))
        removed, keys = self._cache.removed - self._num_rows, self._next_keys(len(rows))
        removed = removed[(removed >= 0) & (removed < len(rows))]
        self._num_rows, self._num_removed = self._num_rows + len(rows), self._num_removed + len(removed)
        if len(removed):  # they have other keys now
            is_removed = np.zeros(len(rows), bool)
            is_removed[removed] = True
            parts = pc.if_else(pa.array(is_removed), "", rows["part"])
            self._rows.append(pa.table({"part": parts, "group": rows["group"]}))
            left = np.flatnonzero(~is_removed)
            rows, keys = rows.take(pa.array(left)), keys.take(pa.array(left[left < len(keys)]))
        else:
            self._rows.append(rows.select(["part", "group"]))
        self._is_same &= keys.equals(rows["key"])

    @property
    def has_samples(self) -> bool:
        """Whether a sample of the split is still in the cache."""
        return self._num_rows > self._num_removed

    def _next_keys(self, count: int) -> pa.ChunkedArray:
        """Return the next keys of the cache, fewer at its end."""
        while len(self._ahead) < count and (block := next(self._keys, None)) is not None:
            self._ahead = pa.chunked_array([*self._ahead.chunks, *block.chunks], pa.string())
        keys, self._ahead = self._ahead.slice(0, count), self._ahead.slice(count)
        return keys

    def close(self) -> pa.Table:
        """Return part and group of the samples of the cache; those that were appended or removed are in no part.

        Raises:
            DataError: the rows are those of other samples.
        """
        if not self._num_rows or not self._is_same:
            raise DataError(
                f"split {self._path} belongs to other samples: it has {self._num_rows} keys, {self._cache.path} has "
                f"{len(self._cache)}, and they differ; use a split of the same samples"
            )
        if self._num_removed:
            warn_removed(
                f"{self._num_removed:,} samples of the split {self._path} were removed from {self._cache.path}; they "
                "are in no part"
            )
        rows, num_added = pa.concat_tables(self._rows), len(self._cache) - self._num_rows
        first_group = (pc.max(rows["group"]).as_py() or 0) + 1
        added = {"part": pa.repeat("", num_added), "group": np.arange(first_group, first_group + num_added)}
        return pa.concat_tables([rows, pa.table(added, schema=rows.schema)])


@cache_calls
def warn_removed(message: str) -> None:
    """Log that something names samples that were removed from a cache, once in a process."""
    _log.warning(message)


def column_parts(names: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Return the part that each value of a column `split` names, as texts: empty for null and all other values."""
    known = pc.unique(names)
    parts = pa.array([PART_NAMES.get(str(name).lower(), "") for name in known.to_pylist()], pa.string())
    return parts.take(pc.index_in(names, value_set=known))
