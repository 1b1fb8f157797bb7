"""Hard negatives: for each sample of a cache, samples that are near it and do not belong to it.

A keyed table has the samples that were looked at: `group`, the number of the near-duplicate group; `negatives`, a list
of rows of samples, best first; and `scores`, their cosines. Two samples of one group are never negatives of each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Floats, Ints
from embedcache.dataset import keytable
from embedcache.errors import DataError
from embedcache.files import AnyPath
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class HardNegatives:
    """Hard negatives of all samples of some caches, counted across them.

    Args:
        negatives_SK: (S, K) int32 samples, best first; -1: none.
        groups_S: (S,) int64 near-duplicate group of each sample.
    """

    negatives_SK: Array
    groups_S: Ints


def write_negatives(
    path: Path, cache: Cache, groups_S: Ints, negatives_MK: Array, scores_MK: Floats, about: Mapping[str, Any]
) -> None:
    """Write a table of hard negatives.

    Args:
        path: new `.parquet` file.
        cache: the cache.
        groups_S: (S,) near-duplicate group of each of its samples, -1 for a sample that was not looked at.
        negatives_MK: (M, K) rows of the negatives of the M samples that were, -1: none.
        scores_MK: their cosines.
        about: how they were found, as JSON values.
    """
    is_some_MK = negatives_MK >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(is_some_MK.sum(axis=1))]).astype(np.int32))
    rows = np.flatnonzero(groups_S >= 0)
    columns = {
        "group": groups_S[rows],
        "negatives": pa.ListArray.from_arrays(offsets, pa.array(negatives_MK[is_some_MK].astype(np.int32))),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(scores_MK[is_some_MK].astype(np.float32))),
    }
    keytable.write(path, [cache], columns, "negatives", about, rows=rows)


def read_negatives(paths: Sequence[AnyPath], caches: Sequence[Cache]) -> HardNegatives:
    """Read the tables of one or several caches; samples without a row have no negatives and are a group of their own.

    Memory: 8 bytes per sample and negative, and 8 per sample.

    Raises:
        PathError, CorruptError: as in `keytable.read`.
        DataError: a table is of other samples than those of the caches, or two are of one cache.
    """
    firsts = np.cumsum([0, *map(len, caches)])
    negatives_SK, groups_S = np.full((firsts[-1], 0), -1, np.int32), np.full(firsts[-1], -1, np.int64)
    for path in map(Path, paths):
        table = keytable.read(path, caches, "negatives")
        first = int(firsts[np.searchsorted(firsts, table.rows[0], side="right") - 1])
        if (groups_S[table.rows] >= 0).any():
            raise DataError(f"negatives {path}: expected one table per cache, got a second one of a cache")
        # No two caches share a number then, as each is below the number of the cache's samples.
        groups_S[table.rows] = first + table.columns["group"].to_numpy()

        lists = table.columns["negatives"]
        lengths_M = pc.list_value_length(lists).to_numpy()
        width = max(negatives_SK.shape[1], int(lengths_M.max()))
        negatives_SK = np.pad(negatives_SK, ((0, 0), (0, width - negatives_SK.shape[1])), constant_values=-1)
        negatives_MK = np.full((len(table.rows), width), -1, np.int32)
        negatives_MK[np.arange(width) < lengths_M[:, None]] = first + pc.list_flatten(lists).to_numpy()
        negatives_SK[table.rows] = negatives_MK

    alone = np.flatnonzero(groups_S < 0)
    groups_S[alone] = -1 - alone
    return HardNegatives(negatives_SK=negatives_SK, groups_S=groups_S)
