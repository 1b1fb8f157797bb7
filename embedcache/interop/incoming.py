"""What an import reads: files whose rows belong together, in a fixed order.

The samples that an import numbers: keys, captions and columns of the tables beside its vectors.

What is left of a source where vectors were imported: paths of images, if the import named some.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embedcache.arrays import Array
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, ItemError, SettingError, SourceError
from embedcache.sources.base import IMPORTED, ImageItem, Sample, TextItem
from embedcache.sources.captions import scalar_columns
from embedcache.sources.files import read_item_file, resolve_item
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table import TableColumns, assign_columns, row_key, row_texts
from embedcache.sources.table_files import Row, TableFile, open_table_file

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


_NUMBER = "{:09d}"


class ImportedRows:
    """Samples of which vectors are imported, one a row: a source that `index` can number.

    A key is the cell of the key column, else the row's number over all parts. Where image vectors are imported, a
    sample has one image; where text vectors are, it has one caption, "" where the cell is blank; where none are, it has
    the captions there are.

    Args:
        incoming: what is imported.
        about: what the cache remembers of it.
        settings: `key_column` and `caption_columns`.

    Raises:
        SettingError: text vectors without a table that has their captions.
    """

    def __init__(self, incoming: Incoming, about: Mapping[str, Any], settings: SourceSettings) -> None:
        self._incoming, self._about, self._settings = incoming, about, settings
        self._has = set(incoming.modalities.values())
        if "text" in self._has and any(part.table is None for part in incoming.parts):
            raise SettingError(
                f"{incoming.path} has vectors of texts, and no table with the captions that they are of; give one"
            )

    def describe(self) -> Mapping[str, Any]:
        """Give what the cache remembers."""
        return self._about

    def samples(self) -> Iterator[Sample]:
        """Go through all rows. Memory: one batch of a table.

        Raises:
            SourceError: a table lacks a column, or has more or fewer rows than its vectors.
        """
        first = 0
        for part in self._incoming.parts:
            rows = self._of_table(part, first) if part.table else self._of_numbers(part, first)
            yield from rows
            first += part.num_rows

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of an image whose file a table names."""
        return ImportedSource(str(self._incoming.path), SourceSettings()).read(item)

    def _of_numbers(self, part: Part, first: int) -> Iterator[Sample]:
        for number in range(first, first + part.num_rows):
            yield Sample(key=_NUMBER.format(number), images=(ImageItem(path=""),) if "image" in self._has else ())

    def _of_table(self, part: Part, first: int) -> Iterator[Sample]:
        assert part.table is not None
        table = _Table.open(part.table, self._settings, set(part.vectors))
        if "text" in self._has:
            table.require_captions()
        count = 0
        for count, row in enumerate(table.rows(), start=1):
            if count <= part.num_rows:
                yield self._sample(table, row, first + count - 1, f"{part.table} row {count - 1:,}")
        if count != part.num_rows:
            vectors = next(iter(part.vectors.values())).path
            raise SourceError(
                f"{part.table} has {count:,} rows, {vectors} has {part.num_rows:,}: they do not belong together"
            )

    def _sample(self, table: "_Table", row: Row, number: int, place: str) -> Sample:
        texts = row_texts(table.columns, row, place)
        if "text" in self._has:
            if len(texts) > 1:
                raise SourceError(
                    f"{place} has {len(texts)} captions and one vector of a text; name the caption's column with "
                    "--caption-column"
                )
            texts = texts or (TextItem(text=""),)
        return Sample(
            key=row_key(table.columns, row, place) or _NUMBER.format(number),
            images=(ImageItem(path=table.image_path(row)),) if "image" in self._has else (),
            texts=texts,
            columns=scalar_columns({name: row.get(name) for name in table.columns.others}),
        )


@dataclass(frozen=True, kw_only=True)
class _Table:
    file: TableFile
    columns: TableColumns

    @classmethod
    def open(cls, path: Path, settings: SourceSettings, vectors: set[str]) -> "_Table":
        """Look at a table, but not at its columns of vectors."""
        file = open_table_file(path)
        columns = assign_columns(file, settings)
        columns = replace(columns, others=tuple(name for name in columns.others if name not in vectors))
        return cls(file=file, columns=columns)

    def require_captions(self) -> None:
        if not self.columns.captions:
            raise SourceError(
                f"{self.file.path} has no column of captions, which vectors of texts need; it has "
                f"{', '.join(self.file.columns)}; name it with --caption-column"
            )

    def rows(self) -> Iterator[Row]:
        return self.file.rows(self.columns.to_read())

    def image_path(self, row: Row) -> str:
        """Give the path that a row has, as it is written; "" where it has none."""
        value = None if self.columns.image is None or self.columns.holds_bytes else row.get(self.columns.image)
        return value if isinstance(value, str) else ""


class ImportedSource:
    """Gives the images that an import named and that are there still; it has no samples to extract from.

    Args:
        location: what was imported.
        settings: none.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported(IMPORTED)
        self._location = Path(location)
        self._root = self._location if self._location.is_dir() else self._location.parent

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": IMPORTED, "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Refuse: there are vectors, and nothing that an encoder could take.

        Raises:
            SourceError: always.
        """
        raise SourceError(
            f"{self._location} was imported: it has vectors, and no images or texts to encode; extract from the images "
            "and captions themselves"
        )

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of an image.

        Raises:
            ItemError: the import named no file, or it is not there.
        """
        if not item.path:
            raise ItemError("the import named no file of this image")
        return read_item_file(resolve_item(self._root, item.path))
