"""Selections: keys of samples with the reason each was selected."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Ints
from embedcache.errors import CorruptError, DataError, PathError
from embedcache.outputs import check_output, new_output
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples of one cache, (M,) int64 rows of its table in ascending order, and why each was selected."""

    rows: Ints
    reasons: Sequence[str]


def check_selection_path(path: Path) -> None:
    """Check that a path ends in `.parquet`, and that there is no file but an output of embedcache.

    `read_selection` reads a file of any other name as a list of keys.
    """
    if path.suffix != ".parquet":
        raise PathError(f"selection {path}: expected a path that ends in .parquet, got {path.suffix or 'no suffix'}")
    check_output(path)


def write_selection(path: Path, cache: Cache, selection: Selection, metadata: Mapping[str, Any]) -> None:
    """Write a selection as Parquet: `row`, `key`, `reason`, and `metadata` (method and settings).

    Raises:
        DataError: the selection is empty.
        PathError: the path does not end in `.parquet`, or is a file that embedcache did not write.
    """
    check_selection_path(path)
    if not len(selection.rows):
        raise DataError(f"no sample of {cache.path} is selected, so {path} is not written; select with looser settings")
    keys = cache.samples["key"].take(pa.array(selection.rows))
    table = pa.table({"row": selection.rows, "key": keys, "reason": list(selection.reasons)})
    header = {"cache": str(cache.path), "spine": cache.info.index_digest, **metadata}
    with new_output(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"embedcache": json.dumps(header)}), temporary)


def read_selection(path: Path | str, caches: Sequence[Cache]) -> Ints:
    """Return the samples of a selection, ascending and counted across caches: (M,) int64.

    Args:
        path: Parquet file with a column `key`, or text file with one key per line; of a run's `split.parquet`, the keys
            of its training part.
        caches: caches of the keys; a key of several caches is selected in each.

    Raises:
        PathError: the file does not exist.
        CorruptError: the file cannot be read.
        DataError: the file has no keys, or a key that no cache has.
    """
    selected = set(read_selected_keys(Path(path)))
    keys = [key for cache in caches for key in cache.samples["key"].to_pylist()]
    unknown = selected.difference(keys)
    if unknown or not selected:
        shown = ", ".join(repr(key) for key in sorted(unknown)[:3]) or "nothing"
        names = " and ".join(str(cache.path) for cache in caches)
        raise DataError(
            f"selection {path} of {len(selected):,} keys has {shown}; {len(unknown):,} are not keys of {names}, which "
            f"has {len(keys):,}, such as {keys[0]!r}"
        )
    return np.flatnonzero([key in selected for key in keys])


def read_selected_keys(path: Path) -> list[str]:
    """Return the keys of a selection; errors are those of `read_selection`, which also finds their samples."""
    if not path.is_file():
        raise PathError(
            f"selection {path} does not exist; expected Parquet with a column key, or text with one key per line"
        )
    try:
        if path.suffix == ".parquet":
            table = read_table(path)
            if {"part", "group"} <= set(table.column_names):  # the split of a run
                table = table.filter(pc.equal(table["part"], "train"))
            return list(map(str, table["key"].to_pylist()))
        return [line for line in path.read_text().split("\n") if line]
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path}: expected a Parquet file with a column key, or a text file: {error}") from error
