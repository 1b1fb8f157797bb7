"""Splits of samples into training, validation and test parts, and the files that they are written to and read from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools, Ints
from embedcache.dataset import keytable
from embedcache.errors import CorruptError, DataError
from embedcache.provenance import digest_file, read_study
from embedcache.runs import MANIFEST, SPLIT, read_info
from embedcache.store.arrays import check_file
from embedcache.store.cache import Cache
from embedcache.store.columns import Column, to_array

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

_RESTORE = "restore it, or use a new folder"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of each sample of a cache, or of several caches one after another.

    Args:
        parts: `train`, `val`, `test`, or an empty string for a sample that is left out.
        groups: near-duplicate group of each sample; a group is never divided.
    """

    parts: Sequence[str]
    groups: Sequence[int]

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


def write_split(path: Path, caches: Sequence[Cache], split: Split) -> None:
    """Write a split of all samples of some caches: a keyed table with the columns `part` and `group`."""
    keytable.write(path, caches, {"part": split.parts, "group": split.groups}, "split", {})


def check_split(path: Path) -> None:
    """Compare a split with the `run.json` of its run, or the `study.json` of its study, if it has one.

    Raises:
        PathError: it is missing.
        CorruptError: the split or that file has changed since it was written.
    """
    folder = path.parent
    if path.name != SPLIT:
        return
    if (folder / MANIFEST).is_file():
        files = read_info(folder).files
        if SPLIT in files:
            check_file(path, files[SPLIT].checksum, next_step=_RESTORE)
    elif (folder / "study.json").is_file():
        expected = read_study(folder)["split_digest"]
        if not path.is_file() or digest_file(path) != expected:
            raise CorruptError(f"{path}: expected the split that study.json was written for; {_RESTORE}")


def require_split(path: Path) -> None:
    """Check that a file exists and, as `check_split` does, that it is the split of its run.

    Raises:
        PathError: there is no such file.
        CorruptError: it has changed since it was written.
    """
    with keytable.reading_table(path, "split"):
        check_split(path)


def read_split(path: Path, caches: Sequence[Cache]) -> Split:
    """Read the split of all or some of its caches. Samples that were appended to a cache later are in no part.

    Nor are those that were removed from it since, of which a warning tells the number.

    Args:
        path: the file; of a finished run or of a study, it is compared with its digest.
        caches: caches whose samples are returned, one after another.

    Raises:
        PathError: there is no such file.
        CorruptError: the file is not a split, or has changed since it was written.
        DataError: the split belongs to other samples, or all of its samples were removed.
    """
    require_split(path)
    num_samples = sum(map(len, caches))
    table = keytable.read(path, caches, "split").align(num_samples)
    parts = pc.fill_null(table["part"], "")
    is_other = table["group"].is_null().to_numpy()
    groups = pc.fill_null(table["group"], -1).to_numpy().copy()
    groups[is_other] = groups.max() + 1 + np.arange(np.count_nonzero(is_other))
    return Split(parts=Column(parts), groups=Column(pa.array(groups)))


def column_parts(names: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Return the part that each value of a column `split` names, as texts: empty for null and all other values."""
    known = pc.unique(names)
    parts = pa.array([PART_NAMES.get(str(name).lower(), "") for name in known.to_pylist()], pa.string())
    return parts.take(pc.index_in(names, value_set=known))
