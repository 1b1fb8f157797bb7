"""Selections: keys of samples with the reason each was selected."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.dataset.splits import check_split, warn_removed
from embedcache.errors import DataError, PathError, pluralize
from embedcache.files import TEXT_ENCODING, read_file, reading
from embedcache.outputs import check_table_output, new_output, read_metadata, with_metadata
from embedcache.progress import NullProgress, Progress, watch
from embedcache.store.cache import Cache
from embedcache.store.columns import Column, to_array
from embedcache.store.removed import read_removed
from embedcache.store.rows import key_column, match_keys
from embedcache.store.tables import BLOCK, read_table, write_table

_EXPECTED = "expected a Parquet file with a column key, or a text file in UTF-8"
_REASONS = pa.schema({"key": pa.large_string(), "reason": pa.large_string()})


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples of one cache, (M,) int64 rows of its table in ascending order, and why each was selected."""

    rows: Ints
    reasons: Sequence[str]


def check_selection_path(path: Path) -> None:
    """Check that a path ends in `.parquet`, and may be written to; see `check_output`.

    `read_selection` reads a file of any other name as a list of keys.
    """
    check_table_output("selection", path)


def write_selection(
    path: Path, cache: Cache, selection: Selection, metadata: Mapping[str, Any], *, progress: Progress | None = None
) -> None:
    """Write a selection as Parquet: `row`, `key`, `reason`, and `metadata` (method and settings).

    Progress is in samples.

    Raises:
        DataError: the selection is empty, or its rows do not ascend.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """
    check_selection_path(path)
    if not len(selection.rows):
        raise DataError(f"no sample of {cache.path} is selected, so {path} is not written; select with looser settings")
    wrong = np.flatnonzero(np.diff(selection.rows) <= 0)
    if len(wrong):
        before, after = selection.rows[wrong[0] : wrong[0] + 2].tolist()
        raise DataError(
            f"selection {path}: expected rows in ascending order, each once, got {after} after {before}; sort them, "
            "and their reasons with them"
        )
    blocks = key_column([cache]).select(selection.rows).blocks(BLOCK)
    watched = watch(blocks, progress or NullProgress(), "writing the selection", len(selection.rows), "samples")
    keys = to_array(Column(pa.chunked_array(watched, pa.string())), pa.string())
    table = pa.table({"row": selection.rows, "key": keys, "reason": to_array(selection.reasons, pa.string())})
    header = {"cache": str(cache.path), "index_digest": cache.info.index_digest, **metadata}
    with new_output(path) as temporary:
        write_table(temporary, with_metadata(table, header))


def read_selection(path: Path | str, caches: Sequence[Cache], *, can_be_removed: bool = False) -> Ints:
    """Return the samples of a selection, ascending and counted across caches: (M,) int64.

    Samples that are known to have been removed from a cache since are left out, and a warning tells their number.

    Args:
        path: Parquet file with a column `key`, text file in UTF-8 with one key per line, or `.npy` of DataComp's uids;
            of a run's `split.parquet`, the keys of its training part.
        caches: caches of the keys; a key of several caches is selected in each.
        can_be_removed: whether all of the samples may have been removed; the result is empty then.

    Raises:
        PathError: the file does not exist.
        CorruptError: the file cannot be read.
        DataError: the file has no keys, a key that no cache has, or those of removed samples only.
    """
    selected = pc.unique(read_selected_keys(Path(path)))
    if not len(selected):
        raise DataError(
            f"selection {path}: expected keys of samples, got none; name some, or leave the selection out to use all "
            "samples"
        )
    names = " and ".join(str(cache.path) for cache in caches)
    rows, is_found = match_keys(caches, selected)
    unknown = _without_removed(path, selected.filter(pa.array(~is_found)), caches)
    if len(unknown):
        shown = ", ".join(map(repr, sorted(unknown.to_pylist(), key=str)[:3]))
        are_unknown = pluralize(len(unknown), "is no key", "are not keys")
        raise DataError(
            f"selection {path} of {pluralize(len(selected), 'key')} has {shown}; {are_unknown} of {names}, which "
            f"has {sum(map(len, caches)):,}, such as {caches[0].key(0)!r}"
        )
    if not (len(rows) or can_be_removed):
        raise DataError(f"selection {path}: expected samples of {names}, got only removed ones; make a new selection")
    return rows


def _without_removed(path: Path | str, keys: pa.Array, caches: Sequence[Cache]) -> pa.Array:
    """Return keys that no cache has, without those of samples that were removed."""
    removed = [read_removed(cache.path, cache.info) for cache in caches if cache.info.is_partial] if len(keys) else []
    if not removed:
        return keys
    is_unknown = [not any(of_cache.has(key) for of_cache in removed) for key in keys.to_pylist()]
    unknown = keys.filter(pa.array(is_unknown))
    if len(unknown) < len(keys):
        num_removed = len(keys) - len(unknown)
        rest = "was removed from the cache; it is" if num_removed == 1 else "were removed from the cache; they are"
        warn_removed(f"{pluralize(num_removed, 'sample')} of the selection {path} {rest} left out")
    return unknown


def read_selected_keys(path: Path) -> pa.Array:
    """Return the keys of a selection; errors are those of `read_selection`, which also finds their samples."""
    if not path.is_file():
        got = "is no file" if path.exists() else "does not exist"
        raise PathError(f"selection {path} {got}; expected Parquet with a column key, or text with one key per line")
    check_split(path)  # the split of a run may serve as a selection
    with reading(path, _EXPECTED):
        if path.suffix == ".parquet":
            table = read_table(path)
            read_metadata(path, table.schema)
            if {"part", "group"} <= set(table.column_names):
                table = table.filter(pc.equal(table["part"], "train"))
            return table["key"].cast(pa.large_string()).combine_chunks()
        if path.suffix == ".npy":
            return _read_uids(path)
        lines = read_file(path).decode(TEXT_ENCODING).split("\n")
        return pa.array([key for line in lines if (key := line.removesuffix("\r"))], pa.large_string())


def _read_uids(path: Path) -> pa.Array:
    """Return the keys of a list of DataComp's uids, two unsigned integers each: 32 hexadecimal digits."""
    uids = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
    if not isinstance(uids, np.ndarray) or uids.dtype != np.dtype("u8,u8") or uids.ndim != 1:
        raise DataError(f"selection {path}: expected a list of uids, one row of dtype u8,u8, got other arrays")
    digits = np.stack([uids["f0"], uids["f1"]], axis=1).astype(">u8").tobytes().hex()
    return pa.array([digits[place : place + 32] for place in range(0, len(digits), 32)], pa.large_string())


def read_selected_reasons(path: Path) -> pa.Table:
    """Return `key` and `reason` of a Parquet file; no rows for one that is not a selection and has no reasons."""
    with reading(path, _EXPECTED):
        table = read_table(path)
        about = read_metadata(path, table.schema)
        if "reason" not in table.column_names and "index_digest" not in about:
            return _REASONS.empty_table()
        return table.select(_REASONS.names).cast(_REASONS).combine_chunks()
