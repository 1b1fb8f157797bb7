"""What an import reads: files whose rows belong together, in a fixed order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from embedcache.arrays import Array
from embedcache.encoders.contract import Modality
from embedcache.errors import DataError

DTYPES = ("float16", "float32")


class VectorRows(Protocol):
    """The vectors of one file, a row each."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def num_rows(self) -> int:
        """How many."""
        ...

    @property
    def width(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def dtype(self) -> str:
        """`float16` or `float32`."""
        ...

    def blocks(self, first: int, size: int) -> Iterator[Array]:
        """Go through the rows from `first` on: arrays (B, D), B at most `size`; a row without a vector is NaN."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """Files whose rows belong together: row i of each is of one sample.

    Args:
        vectors: name of the feature -> its rows.
        table: keys, captions and columns; None where there are none.
    """

    vectors: Mapping[str, VectorRows]
    table: Path | None = None

    @property
    def num_rows(self) -> int:
        """Rows of each of the files."""
        return next(iter(self.vectors.values())).num_rows


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """All that one import takes in.

    Args:
        form: name of the format.
        path: what the user named.
        modalities: name of a feature -> what its vectors are of.
        parts: at least one; rows are counted on from part to part.
        about: what the format itself says of the vectors, as JSON.

    Raises:
        DataError: files of one part differ in their number of rows, or those of one feature in width or dtype; or
            there is no row at all.
    """

    form: str
    path: Path
    modalities: Mapping[str, Modality]
    parts: Sequence[Part]
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in self.parts:
            _check_rows(part)
        for name in self.modalities:
            _check_alike([part.vectors[name] for part in self.parts])
        if not self.num_rows:
            raise DataError(f"{self.path} holds no row; nothing is imported")

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)

    @property
    def files(self) -> list[Path]:
        """Every file that is read, once, in the order of the parts."""
        found = [path for part in self.parts for path in (*(rows.path for rows in part.vectors.values()), part.table)]
        return list(dict.fromkeys(path for path in found if path is not None))

    def like(self, name: str) -> VectorRows:
        """Give some rows of a feature, for its width and dtype."""
        return self.parts[0].vectors[name]

    def blocks(self, name: str, first: int, size: int) -> Iterator[Array]:
        """Go through a feature from a row on, in arrays of exactly `size` rows, and a last one of what is left."""
        return recut(self._from(name, first, size), size)

    def _from(self, name: str, first: int, size: int) -> Iterator[Array]:
        for part in self.parts:
            if first < part.num_rows:
                yield from part.vectors[name].blocks(first, size)
            first = max(0, first - part.num_rows)


def recut(arrays: Iterator[Array], size: int) -> Iterator[Array]:
    """Cut a stream of arrays anew, into arrays of `size` rows; the last may be shorter. Memory: two of each.

    Example:
        >>> [len(block) for block in recut(iter([np.zeros((3, 2)), np.zeros((4, 2))]), 5)]
        [5, 2]
    """
    waiting: list[Array] = []
    for array in arrays:
        waiting.append(array)
        if sum(map(len, waiting)) >= size:
            joined = np.concatenate(waiting)
            whole = len(joined) // size * size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            waiting = [joined[whole:].copy()]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def check_dtype(dtype: np.dtype[np.generic] | str, place: str) -> str:
    """Refuse numbers that a cache does not hold.

    Raises:
        DataError: says what can be imported.
    """
    if str(dtype) not in DTYPES:
        raise DataError(
            f"{place} holds {dtype}; little-endian {' or '.join(DTYPES)} can be imported: write it anew as one of them"
        )
    return str(dtype)


def _check_rows(part: Part) -> None:
    counts = {str(rows.path): rows.num_rows for rows in part.vectors.values()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise DataError(f"files that belong together differ in their number of rows: {listed}; get them again")


def _check_alike(parts: Sequence[VectorRows]) -> None:
    first = parts[0]
    for rows in parts:
        if (rows.width, rows.dtype) != (first.width, first.dtype):
            raise DataError(
                f"{rows.path} holds {rows.dtype} vectors of {rows.width:,} numbers, {first.path} {first.dtype} ones of "
                f"{first.width:,}; a feature has one dtype and one width"
            )
