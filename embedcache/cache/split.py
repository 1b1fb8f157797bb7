"""Which samples are for training, validation and test: a table in the run, written down once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Ints
from embedcache.cache.tables import read_table
from embedcache.disk import replacing
from embedcache.errors import CorruptError, DataError, PathError

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part for each sample of a cache.

    Args:
        keys: the samples' keys, in row order.
        parts: `train`, `val`, `test`, or `` for a sample left out.
        groups: samples with the same number stay together.
    """

    keys: list[str]
    parts: list[str]
    groups: list[int]

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
    """Write a split as Parquet: `row`, `key`, `part`, `group`."""
    table = pa.table(
        {
            "row": range(len(split.keys)),
            "key": split.keys,
            "part": split.parts,
            "group": split.groups,
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_split(path: Path, keys: list[str]) -> Split:
    """Read a split and check that it is of these samples. Those that were added to the cache since are in no part.

    Args:
        path: what `write_split` wrote.
        keys: the keys of the cache that it should be of, in row order.

    Raises:
        PathError: there is no such file.
        CorruptError: it is no split.
        DataError: it is of other samples.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; it is written by embedcache train")
    try:
        table = read_table(path, ["key", "part", "group"])
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptError(f"{path} is no split: {error}") from error
    columns = table.to_pydict()
    if columns["key"] != keys[: len(table)]:
        raise DataError(
            f"split {path} is of other samples: it has {len(table)} keys, the cache has {len(keys)}, and they differ"
        )
    num_added, first_group = len(keys) - len(table), max(columns["group"], default=-1) + 1
    return Split(
        keys=keys,
        parts=[*columns["part"], *[""] * num_added],
        groups=[*columns["group"], *range(first_group, first_group + num_added)],
    )
