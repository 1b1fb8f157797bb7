"""Selections for other tools: DataComp's uids, a list of keys, or new WebDataset shards."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from embedcache.arrays import Array
from embedcache.cache.cache import Cache
from embedcache.cache.selection import read_selection
from embedcache.curate.select.shards import write_shards
from embedcache.disk import replacing, write_atomic
from embedcache.errors import DataError, PathError
from embedcache.progress import Progress

Format: TypeAlias = Literal["datacomp", "keys", "webdataset"]

_UID = re.compile(r"[0-9a-fA-F]{32}")


def export(
    cache_path: Path | str, selection: Path, out_path: Path, form: Format, *, progress: Progress | None = None
) -> int:
    """Write a selection in another tool's format.

    `datacomp` is a `.npy` of dtype `u8,u8`, the halves of DataComp's uids, sorted; `keys` is a text with a key a line,
    in the order of the cache; `webdataset` is a folder of tars, see `write_shards`. A file is whole or absent.

    Args:
        cache_path: the cache that the selection is of.
        selection: Parquet, or a text with a key a line.
        out_path: a file; for `webdataset` a folder.
        form: the format.
        progress: told about samples.

    Returns:
        How many samples were written.

    Raises:
        DataError: keys that are no uids, for `datacomp`; or the selection names a key that the cache has not.
        PathError: there is no such selection; for `webdataset`, the folder is there already, or the source is gone.
    """
    cache = Cache(cache_path)
    rows = read_selection(selection, [cache])
    if form == "webdataset":
        write_shards(cache, rows, out_path, progress=progress)
        return len(rows)
    if out_path.is_dir():
        raise PathError(f"{out_path} is a folder; give the path of a file for --format {form}")
    all_keys = cache.samples["key"].to_pylist()
    keys = [all_keys[row] for row in rows.tolist()]
    if form == "keys":
        _refuse_breaks(keys)
        write_atomic(out_path, "".join(f"{key}\n" for key in keys).encode())
    else:
        uids = to_uids(keys)
        with replacing(out_path) as temporary, temporary.open("wb") as file:
            np.save(file, uids)
    return len(rows)


def to_uids(keys: Sequence[str]) -> Array:
    """Make DataComp's uids of keys of 32 hexadecimal digits: (M,) of dtype `u8,u8`, sorted.

    Raises:
        DataError: a key is no such number.
    """
    others = [key for key in keys if not _UID.fullmatch(key)]
    if others:
        raise DataError(
            f"{len(others):,} of {len(keys):,} keys are no uids of DataComp, which are 32 hexadecimal digits, first "
            f"{others[0]!r}; take --format keys, or extract with --key-column uid"
        )
    return np.array(sorted((int(key[:16], 16), int(key[16:], 16)) for key in keys), np.dtype("u8,u8"))


def _refuse_breaks(keys: Sequence[str]) -> None:
    broken = [key for key in keys if "\n" in key]
    if broken:
        raise DataError(f"{len(broken):,} keys hold a line break, first {broken[0]!r}; a list has a key a line")
