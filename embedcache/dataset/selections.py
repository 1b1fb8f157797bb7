"""A selection: some samples of a cache, by key, with the reason each was kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Ints
from embedcache.errors import CorruptError, DataError, PathError
from embedcache.files import replacing
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples of one cache.

    Args:
        rows: (M,) int64 rows of `Cache.samples`, ascending, each once.
        reasons: why each was kept, in a few words.
    """

    rows: Ints
    reasons: Sequence[str]


def check_selection_path(path: Path) -> None:
    """Refuse a name that `read_selection` would take for a list of keys.

    Raises:
        PathError: it does not end in `.parquet`.
    """
    if path.suffix != ".parquet":
        raise PathError(f"{path} is no name for a selection; end it in .parquet")


def write_selection(path: Path, cache: Cache, selection: Selection, about: Mapping[str, Any]) -> None:
    """Write a selection as Parquet: `row`, `key`, `reason`; its metadata says of which cache, and how it was made.

    Args:
        path: of the file, in the place of whatever is there.
        cache: whose samples they are.
        selection: at least one sample.
        about: JSON values: the method and its settings.

    Raises:
        DataError: nothing is selected.
        PathError: the path does not end in `.parquet`.
    """
    check_selection_path(path)
    if not len(selection.rows):
        raise DataError(f"nothing of {cache.path} is selected, so {path} is not written")
    keys = cache.samples["key"].take(pa.array(selection.rows))
    table = pa.table({"row": selection.rows, "key": keys, "reason": list(selection.reasons)})
    made = {"cache": str(cache.path), "spine": cache.info.index_digest, **about}
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"embedcache": json.dumps(made)}), temporary)


def read_selection(path: Path | str, caches: Sequence[Cache]) -> Ints:
    """Get the samples that a selection names, counted on from cache to cache, ascending.

    Args:
        path: Parquet with a column `key`, or text with a key a line.
        caches: where the keys are looked for. A key that several hold is selected in each.

    Raises:
        PathError: there is no such file.
        CorruptError: it cannot be read.
        DataError: it names a key that no cache has, or none at all.
    """
    selected = set(_read_keys(Path(path)))
    keys = [key for cache in caches for key in cache.samples["key"].to_pylist()]
    unknown = selected.difference(keys)
    if unknown or not selected:
        shown = ", ".join(repr(key) for key in sorted(unknown)[:3]) or "nothing"
        where = " and ".join(str(cache.path) for cache in caches)
        raise DataError(
            f"selection {path} of {len(selected):,} keys names {shown}; {len(unknown):,} are no keys of {where}, which "
            f"has {len(keys):,}, such as {keys[0]!r}"
        )
    return np.flatnonzero([key in selected for key in keys])


def _read_keys(path: Path) -> list[str]:
    if not path.is_file():
        raise PathError(f"selection {path} does not exist; give Parquet with a column key, or text with a key a line")
    try:
        if path.suffix == ".parquet":
            return list(map(str, read_table(path, ["key"])["key"].to_pylist()))
        return [line for line in path.read_text().split("\n") if line]
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is no selection: {error}; it must be Parquet with a column key, or text") from error
