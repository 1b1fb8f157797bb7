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

    def present(self) -> "tuple[Ints, pa.Array]":
        """Return the places that are not null, ascending, and their values."""
        array = to_array(self, self.array.type)
        return np.flatnonzero(~self.is_null()), array.drop_null()

    def count(self, value: object) -> int:
        """Count a value."""
        return int(pc.sum(pc.equal(self.array, pa.scalar(value, self.array.type))).as_py() or 0)

    def _parts(self) -> "Iterable[pa.Array | pa.ChunkedArray]":
        """Return all values, in parts of any size."""
        return [self.array]

    def _value(self, index: int) -> Any:
        """Return the value at a place, which may count from the end."""
        return self.array[index].as_py()

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.array[index].to_pylist() if isinstance(index, slice) else self._value(index)

    def __iter__(self) -> Iterator[T]:
        return iter(self.array.to_pylist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001 - as NumPy calls it
        values: Array = np.array(self.array, dtype=dtype, copy=copy)
        return values

    def __contains__(self, value: object) -> bool:
        values = self.present()[1] if value is not None else self.array
        return bool(len(values) and pc.any(pc.equal(values, pa.scalar(value, values.type))).as_py())

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


class SparseColumn(Column[T]):
    """A column that is null but at a few places, as the reasons of failed items are.

    Args:
        length: number of values, nulls included.
        places: (P,) int64, ascending, of the values that are not null.
        values: these values, P of them.
    """

    def __init__(self, length: int, places: Ints, values: "pa.Array") -> None:
        self._length, self._places, self._values = length, places, values

    @property
    def array(self) -> "pa.Array | pa.ChunkedArray":
        """The values and all nulls in Arrow's memory, made now."""
        indices = np.zeros(self._length, np.int64)
        indices[self._places] = np.arange(len(self._places))
        return self._values.take(pa.array(indices, mask=self.is_null()))

    def is_null(self) -> Bools:
        """Return which values are null: (N,) bool."""
        is_null = np.ones(self._length, bool)
        is_null[self._places] = False
        return is_null

    def present(self) -> "tuple[Ints, pa.Array]":
        """Return the places that are not null, ascending, and their values."""
        return self._places, self._values

    def _value(self, index: int) -> Any:
        index = range(self._length)[index]
        place = int(np.searchsorted(self._places, index))
        is_present = place < len(self._places) and self._places[place] == index
        return self._values[place].as_py() if is_present else None

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
