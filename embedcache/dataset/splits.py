"""Splits of samples into training, validation and test parts: by near-duplicate groups, by key, or by a column."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cache_calls
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array, Bools, Ints, distinct, number_values
from embedcache.dataset.inputs import Reader
from embedcache.dataset.near_duplicate_groups import near_duplicate_groups
from embedcache.dataset.pairs import Pairs, caption_languages, name_caches
from embedcache.dataset.random_groups import draw_groups
from embedcache.dataset.settings import KINDS, SplitSettings
from embedcache.errors import CorruptError, DataError, PathError, SettingError, SourceError, one_line
from embedcache.files import replacing
from embedcache.outputs import to_metadata
from embedcache.progress import NullProgress, Progress, watch
from embedcache.provenance import INDEX_DIGEST, digest_file, read_record
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.checksums import BLOCK
from embedcache.store.columns import Column, in_blocks, to_array
from embedcache.store.keys import iterate_keys, key_column
from embedcache.store.tables import add_footer_checksum, iterate_table

_log = logging.getLogger(__name__)

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

    keys: Sequence[str]
    parts: Sequence[str]
    groups: Sequence[int]
    index_digests: Sequence[str] = ()

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


def write_split(path: Path, split: Split) -> None:
    """Write a split as Parquet: `row`, `key`, `part`, `group`; `spine` for several caches. Memory: a million rows."""
    values: dict[str, Sequence[object]] = {"key": split.keys, "part": split.parts, "group": split.groups}
    if split.index_digests:
        values[INDEX_DIGEST] = split.index_digests
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


_ROWS_PER_GROUP = 2**20  # as Arrow divides a table: the bytes are those of a table that is written as a whole


def check_split(path: Path) -> None:
    """Compare a split with its digest in the `config.json` of its run, or the `study.json` of its study, if any.

    Raises:
        CorruptError: the split is missing, or it or that file has changed since it was written.
    """
    for name in _MANIFESTS if path.name == "split.parquet" else ():
        if (manifest := path.with_name(name)).is_file():
            written = read_record(manifest, next_step="restore the file").get("split")
            if isinstance(written, str) and written and not (path.is_file() and digest_file(path) == written):
                got = "another file" if path.is_file() else "none"
                raise CorruptError(
                    f"{path}: expected the split that {manifest.name} was written for, got {got}; restore it, or use "
                    "a new folder"
                )


_MANIFESTS = ("config.json", "study.json")


def read_split(path: Path, caches: Sequence[Cache], *, progress: Progress | None = None) -> Split:
    """Read the split of all or some of its caches. Samples that were appended to a cache later are in no part.

    Nor are those that were removed from it since, of which a warning tells the number.

    Args:
        path: the file; of a finished run or of a study, it is compared with its digest.
        caches: caches whose samples are returned, one after another.
        progress: progress in rows of the file.

    Raises:
        PathError: the file does not exist.
        CorruptError: the file is not a split, or has changed since it was written.
        DataError: the split belongs to other samples, or all of its samples were removed.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; it is written by embedcache train")
    check_split(path)
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
    return Split(
        keys=key_column(caches),
        parts=Column(joined["part"]),
        groups=Column(joined["group"]),
        index_digests=_index_digests(caches),
    )


_COLUMNS = pa.schema([("key", pa.string()), ("part", pa.string()), ("group", pa.int64()), (INDEX_DIGEST, pa.string())])


def _iterate_rows(path: Path) -> Iterator[pa.Table]:
    """Iterate over the rows of a split: key, part, group and, of several caches, spine. Memory: a block."""
    try:
        for table in iterate_table(path, BLOCK, _COLUMNS.names):
            schema = _COLUMNS if INDEX_DIGEST in table.column_names else _COLUMNS.remove(len(_COLUMNS) - 1)
            yield table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptError(
            f"{path}: expected a split with the columns key, part and group: {one_line(error)}"
        ) from error


class _CacheRows:
    """The rows of a split that belong to one cache, whose keys are compared block by block."""

    def __init__(self, path: Path, cache: Cache) -> None:
        self._path, self._cache, self._keys = path, cache, iterate_keys(cache)
        self._ahead = pa.chunked_array([], pa.string())  # keys that were read and not compared yet
        self._rows: list[pa.Table] = []
        self._num_rows, self._num_removed, self._is_same = 0, 0, True

    def add(self, rows: pa.Table) -> None:
        """Compare the next rows of the split, some of which may belong to other caches."""
        if INDEX_DIGEST in rows.column_names:
            same = [name for name in pc.unique(rows[INDEX_DIGEST]).to_pylist() if self._cache.info.has_rows_of(name)]
            rows = rows.filter(pc.is_in(rows[INDEX_DIGEST], value_set=pa.array(same, pa.string())))
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


def make_split(
    caches: Sequence[Cache],
    pairs: Pairs,
    settings: SplitSettings,
    readers: Mapping[str, Reader],
    *,
    progress: Progress | None = None,
) -> Split:
    """Split the samples that have both features. The same features and settings give the same split.

    Only a strict split reads the features; time and memory as in `near_duplicate_groups`.

    Args:
        caches: the caches.
        pairs: items of both features, counted across caches.
        settings: settings of the split.
        readers: modality -> reader of its feature, in the order of the pair's sides.
        progress: progress of a strict split, and what it found among many items.

    Raises:
        UnknownNameError: the kind is neither a known one nor a file.
        SettingError: a part is empty.
        SourceError: `column` without a column `split` that names train and test.
    """
    if settings.kind != "strict":
        return split_samples(caches, pairs.samples, settings, progress=progress)
    groups = near_duplicate_groups(pairs, settings, readers, progress or NullProgress())
    split = _by_groups(caches, pairs.samples, number_values(groups), settings, progress)
    _require_parts(split, groups, settings, readers, _languages(caches, pairs, list(readers)))
    return split


def split_samples(
    caches: Sequence[Cache], samples: Ints, settings: SplitSettings, *, progress: Progress | None = None
) -> Split:
    """Split samples without their features: by key, by a column or by a file.

    Args:
        caches: the caches.
        samples: (S,) the samples, counted across caches, ascending; the others are in no part.
        settings: settings of the split.
        progress: progress in samples.

    Raises:
        UnknownNameError, SettingError, SourceError: as in `make_split`.
    """
    if settings.kind == "column":
        return _by_column(caches, samples, settings, progress)
    if settings.kind == "key":
        groups = np.arange(len(samples))
        split = _by_groups(caches, samples, groups, settings, progress)
        _require_parts(split, groups, settings, ())
        return split
    if settings.path is None or not settings.path.is_file():
        raise unknown_name("split", settings.kind, KINDS, hint="or use the path of another run's split.parquet")
    return read_split(settings.path, caches, progress=progress)


def _languages(caches: Sequence[Cache], pairs: Pairs, modalities: Sequence[str]) -> list[str]:
    """Return the languages of the captions of some pairs, sorted."""
    if "text" not in modalities:
        return []
    captions = (pairs.first, pairs.second)[modalities.index("text")]
    languages = caption_languages(caches).take(pa.array(captions.rows))
    return sorted(pc.unique(languages.drop_null()).to_pylist())


def _require_parts(
    split: Split, groups: Ints, settings: SplitSettings, modalities: Iterable[str], languages: Sequence[str] = ()
) -> None:
    if split.parts.count("val") and split.parts.count("test"):
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


def _by_column(caches: Sequence[Cache], samples: Ints, settings: SplitSettings, progress: Progress | None) -> Split:
    for cache in caches:
        if "split" not in cache.columns:
            raise SourceError(f"the samples of {cache.path} have no column 'split'; use --split strict or --split key")
    columns = [cache.column("split") for cache in caches]
    codes = [pc.index_in(column_parts(names), value_set=pa.array(list(_CODES))) for names in columns]
    part_S = np.concatenate([of_cache.to_numpy() for of_cache in codes]).astype(np.int8)
    if not {_CODES["train"], _CODES["test"]} <= set(distinct(part_S).tolist()):
        known = sorted({str(name).lower() for names in columns for name in pc.unique(names).to_pylist()})
        raise SourceError(f"column 'split' of {name_caches(caches)}: expected train and test, got {', '.join(known)}")
    is_used = np.zeros(len(part_S), bool)
    is_used[samples] = True
    part_S[~is_used] = _CODES[""]
    if not (part_S == _CODES["val"]).any():
        train = np.flatnonzero(part_S == _CODES["train"])
        quota = _quota(settings.val_fraction, settings.max_val, len(train))
        drawn = draw_groups(key_column(caches).select(train), np.arange(len(train)), [quota], settings.seed, progress)
        part_S[train[drawn == 0]] = _CODES["val"]
    return _split(caches, part_S, np.arange(len(part_S)))


def _by_groups(
    caches: Sequence[Cache], samples: Ints, groups: Ints, settings: SplitSettings, progress: Progress | None
) -> Split:
    """Draw the parts of samples, ascending, by whole groups, which are numbered from 0."""
    num_samples = sum(map(len, caches))
    quotas = [
        _quota(settings.test_fraction, settings.max_test, len(samples)),
        _quota(settings.val_fraction, settings.max_val, len(samples)),
    ]
    drawn = draw_groups(key_column(caches).select(samples), groups, quotas, settings.seed, progress)
    part_S, group_S = np.full(num_samples, _CODES[""], np.int8), np.full(num_samples, -1, np.int64)
    part_S[samples] = np.array([_CODES["train"], _CODES["test"], _CODES["val"]], np.int8)[drawn + 1]
    group_S[samples] = groups
    return _split(caches, part_S, group_S)


_CODES = {"train": 0, "val": 1, "test": 2, "": 3}


def _split(caches: Sequence[Cache], part_S: Array, group_S: Ints) -> Split:
    names = pa.array(list(_CODES), pa.string())
    return Split(
        keys=key_column(caches),
        parts=Column(names.take(pa.array(part_S))),
        groups=Column(pa.array(group_S)),
        index_digests=_index_digests(caches),
    )


def _index_digests(caches: Sequence[Cache]) -> Sequence[str]:
    """Return the index digest of each sample's cache; none for a single cache."""
    if len(caches) == 1:
        return ()
    which_S = np.repeat(np.arange(len(caches), dtype=np.int32), list(map(len, caches)))
    return Column(pa.DictionaryArray.from_arrays(which_S, [cache.info.index_digest for cache in caches]))


def _quota(fraction: float, largest: int, count: int) -> int:
    return min(round(fraction * count), largest)


PART_NAMES: dict[str, Part] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""Value of a source's column `split`, in lower case -> part."""


def column_parts(names: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Return the part that each value of a column `split` names, as texts: empty for null and all other values."""
    known = pc.unique(names)
    parts = pa.array([PART_NAMES.get(str(name).lower(), "") for name in known.to_pylist()], pa.string())
    return parts.take(pc.index_in(names, value_set=known))
