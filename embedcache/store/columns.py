"""Columns in Arrow's memory: keys, hashes and reasons of millions of items without a Python object for each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints

T = TypeVar("T")
_MAX_STRING_BYTES = 2**31 - 1
_SELECTED_FROM = 65_536  # rows of a block of which some are selected


class Column(Sequence[T]):
    """A column of values, None where it is null; a Python object is made only for a value that is read.

    Args:
        array: the values.
    """

    def __init__(self, array: "pa.Array | pa.ChunkedArray") -> None:
        self._array = array

    @property
    def array(self) -> "pa.Array | pa.ChunkedArray":
        """The values in Arrow's memory."""
        return self._array

    def blocks(self, size: int) -> "Iterator[pa.Array]":
        """Iterate over the values, `size` at a time. Memory: a block, also of a column that is read in blocks."""
        left: pa.ChunkedArray | None = None
        for values in self._parts():
            chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
            left = pa.chunked_array([*(left.chunks if left else ()), *chunks], values.type)
            del values, chunks
            while len(left) >= size:
                block, left = left.slice(0, size).combine_chunks(), left.slice(size)
                yield block
                del block  # not kept while the next one is read
        if left is not None and len(left):
            yield left.combine_chunks()

    def select(self, rows: Ints) -> "Column[T]":
        """Return the values of some rows, (M,) int64 ascending, as a column that is read in blocks when it is used."""

        def read() -> "Iterator[pa.Array]":
            start = 0
            for block in self.blocks(_SELECTED_FROM):
                first, last = np.searchsorted(rows, [start, start + len(block)])
                yield block.take(pa.array(rows[first:last] - start))
                start += len(block)

        return DeferredColumn(len(rows), lambda: pa.chunked_array(read()) if len(self) else self.array, read=read)

    def is_null(self) -> Bools:
        """Return which values are null: (N,) bool."""
        is_null: Bools = self.array.is_null().to_numpy(zero_copy_only=False)
        return is_null

    def count(self, value: object) -> int:
        """Count a value."""
        return int(pc.sum(pc.equal(self.array, pa.scalar(value, self.array.type))).as_py() or 0)

    def _parts(self) -> "Iterable[pa.Array | pa.ChunkedArray]":
        """Return all values, in parts of any size."""
        return [self.array]

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.array[index].to_pylist() if isinstance(index, slice) else self.array[index].as_py()

    def __iter__(self) -> Iterator[T]:
        return iter(self.array.to_pylist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001 - as NumPy calls it
        values: Array = np.array(self.array, dtype=dtype, copy=copy)
        return values

    def __contains__(self, value: object) -> bool:
        array = self.array
        return bool(pc.any(array.is_null() if value is None else pc.equal(array, pa.scalar(value, array.type))).as_py())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class DeferredColumn(Column[T]):
    """A column of a known length whose values are read when one is used, as the keys of a cache are.

    Args:
        length: number of values.
        load: returns all values; called whenever they are used, so it keeps them if that is often.
        read: iterates over all values, in blocks of any size, for `blocks`; None: `load` is called.
    """

    def __init__(
        self,
        length: int,
        load: "Callable[[], pa.Array | pa.ChunkedArray]",
        *,
        read: "Callable[[], Iterator[pa.Array | pa.ChunkedArray]] | None" = None,
    ) -> None:
        self._length, self._load, self._read = length, load, read

    @property
    def array(self) -> "pa.Array | pa.ChunkedArray":
        """The values in Arrow's memory, read now."""
        return self._load()

    def _parts(self) -> "Iterable[pa.Array | pa.ChunkedArray]":
        return self._read() if self._read else [self.array]

    def __len__(self) -> int:
        return self._length


def to_array(values: Sequence[Any], kind: pa.DataType) -> "pa.Array | pa.ChunkedArray":
    """Return values as one Arrow array; strings beyond the 2 GiB that one can hold stay in chunks."""
    if not isinstance(values, Column):
        return pa.array(values, kind)
    array = values.array if values.array.type == kind else values.array.cast(kind)
    if not isinstance(array, pa.ChunkedArray) or (pa.types.is_string(kind) and array.nbytes > _MAX_STRING_BYTES):
        return array
    return array.combine_chunks()


def widen(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return texts that exceed the 2 GiB of one array of `string` as `large_string`.

    Arrow joins the chunks of a column of `string` when rows are taken from it, and fails beyond that.
    """
    if pa.types.is_string(texts.type) and texts.nbytes > _MAX_STRING_BYTES:
        return texts.cast(pa.large_string())
    return texts


def index_in(texts: "pa.Array | pa.ChunkedArray", known: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Return the first place of each text among known ones, null if it is not one of them; all may exceed 2 GiB."""
    if texts.type != known.type:
        texts, known = texts.cast(pa.large_string()), known.cast(pa.large_string())
    return pc.index_in(texts, value_set=known)


def is_none(values: Sequence[Any]) -> Bools:
    """Return which values are None: (N,) bool."""
    if isinstance(values, Column):
        return values.is_null()
    return np.array([value is None for value in values], bool)
