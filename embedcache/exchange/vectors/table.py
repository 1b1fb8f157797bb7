"""The samples that an import numbers: keys, captions and columns of the tables beside its vectors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedcache.errors import SettingError, SourceError
from embedcache.exchange.vectors.incoming import Incoming, Part
from embedcache.sources.contract import ImageItem, Sample, TextItem
from embedcache.sources.imported import ImportedSource
from embedcache.sources.settings import SourceSettings
from embedcache.sources.sidecar import scalar_columns
from embedcache.sources.table_columns import TableColumns, name_columns, row_key, row_texts
from embedcache.sources.table_files import Row, TableFile, open_table_file

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
        columns = name_columns(file, settings)
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
