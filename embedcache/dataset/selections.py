"""Selections: some samples of a cache, with columns that say why each was selected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.dataset import keytable
from embedcache.dataset.keytable import KeyTable
from embedcache.dataset.splits import check_split
from embedcache.errors import DataError
from embedcache.progress import Progress
from embedcache.store.cache import Cache

_SPLIT = ["part", "group"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples of one cache, (M,) int64 rows of its table in ascending order, and why each was selected.

    Args:
        rows: the samples.
        columns: name -> a value per sample, such as its concept and cosine: (M,) NumPy or Arrow arrays.
    """

    rows: Ints
    columns: Mapping[str, Any] = field(default_factory=dict)


def write_selection(
    path: Path, cache: Cache, selection: Selection, about: Mapping[str, Any], *, progress: Progress | None = None
) -> None:
    """Write a selection as a keyed table; `about` says how it was made. Progress is in samples.

    Raises:
        DataError: the selection is empty, or its rows do not ascend.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """
    if not len(selection.rows):
        raise DataError(f"no sample of {cache.path} is selected, so {path} is not written; select with looser settings")
    keytable.write(path, [cache], selection.columns, "selection", about, rows=selection.rows, progress=progress)


def read_selection(path: Path | str, caches: Sequence[Cache]) -> Ints:
    """Return the samples of a selection, ascending and counted across caches: (M,) int64.

    Args:
        path: any table or list of keys that `keytable.read` reads; of a split, the samples of its training part.
        caches: caches of the keys.

    Raises:
        PathError, CorruptError, DataError: as in `keytable.read`.
    """
    return read_selection_table(path, caches, columns=_SPLIT).rows


def read_selection_table(
    path: Path | str,
    caches: Sequence[Cache],
    *,
    columns: Sequence[str] | None = None,
    can_be_removed: bool = False,
    can_be_others: bool = False,
) -> KeyTable:
    """Return the samples of a selection with its columns; see `read_selection` and `keytable.read`.

    With `can_be_removed`, all of the samples may have been removed, and the result is empty.
    """
    path = Path(path)
    check_split(path)  # the split of a run may serve as a selection
    table = keytable.read(
        path, caches, "selection", columns=columns, can_be_others=can_be_others, can_be_empty=can_be_removed
    )
    if not set(_SPLIT) <= set(table.columns.column_names):
        return table
    is_training = pc.equal(table.columns["part"], "train")
    return replace(table, rows=table.rows[is_training.to_numpy()], columns=table.columns.filter(is_training))


def read_selected_keys(path: Path) -> pa.ChunkedArray:
    """Return the keys of a selection without looking for their samples; errors: `read_selection`."""
    check_split(path)
    keytable.read_header(path, "selection")
    with keytable.reading_table(path, "selection"):
        table = keytable.load(path, ["key", *_SPLIT])
        if set(_SPLIT) <= set(table.column_names):
            table = table.filter(pc.equal(table["part"], "train"))
        return table["key"].cast(pa.large_string())
