"""Tables of items and captions as a source: Parquet, CSV, TSV and JSONL files."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedcache.errors import PathError, SourceError
from embedcache.files import open_path
from embedcache.samples import FileItem, Sample
from embedcache.sources.captions import join_captions
from embedcache.sources.files import (
    TABLE_SUFFIXES,
    file_size,
    find_root,
    has_suffix,
    is_folder,
    item_path,
    read_item_file,
    relative_to,
    resolve_item,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import (
    COLUMN_MARK,
    COLUMN_SETTINGS,
    Row,
    RowGroups,
    TableColumns,
    TableFile,
    find_columns,
    item_bytes,
    open_table_file,
    read_sample,
)

_EMBEDDED = re.compile(rf"(.+?\.parquet){COLUMN_MARK}(.+)", re.IGNORECASE)
"""Path of an item whose bytes are in a column of a table."""


class TableSource:
    """One sample per row of a table, or of all tables below a folder, sorted by path.

    Keys are the cells of the key column, else `<path of the file without suffix>/<row>`. A column of images,
    recordings, videos or point clouds holds bytes, a struct of `bytes` and `path` as Hugging Face writes it, or paths:
    absolute, URLs, or relative to the setting `root`, without it to the folder of the table. One column may serve two
    modalities, such as the audio and the video of an `.mp4`. Columns `start_s` and `stop_s` make each recording and
    video an interval; an empty cell is the beginning or the end. Fields of a JSONL file may be missing in any row;
    its columns are the fields of its first 100 rows. Iterating over the samples reads no item.

    With the setting `key_column`, adjacent rows of one key that name the same items are one sample with the captions of
    all of them; see `join_captions`. Without it, `shared_column` is the column of the paths of images, of which several
    rows may name one.
    """

    items_are_files = True

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("table", *COLUMN_SETTINGS, "delimiter", "root")
        root = settings.root and find_root(settings.root)
        self._settings = replace(settings, root=root)
        self._location = open_path(location).absolute()
        self._files = _find_files(self._location)
        self._root = self._location.parent if self._files == [self._location] else self._location
        self._root_text = str(self._root)
        self._row_groups = RowGroups()
        self.shared_column: str | None = None

    def describe(self) -> Mapping[str, Any]:
        return {"type": "table", "path": str(self._location), "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over all samples. Memory holds one batch of rows, without embedded items, and the rows of a key."""
        if self._settings.key_column is None:
            return (sample for _, sample in self._rows())
        return join_captions(self._rows())

    def _rows(self) -> Iterator[tuple[str, Sample]]:
        """Iterate over all rows: the place of each, and its sample."""
        for path in self._files:
            file = open_table_file(path, delimiter=self._settings.delimiter)
            columns = find_columns(file, self._settings)
            image = columns.items.get("image")
            if image not in columns.embedded and not self._settings.key_column:
                self.shared_column = image
            table, stem = (relative_to(self._root_text, name) for name in (str(file.path), file.stem))
            for number, row in enumerate(file.rows(columns.to_read())):
                place = f"{file.path} row {number}"
                items = self._items(file, columns, row, place, (table, number))
                yield place, read_sample(columns, row, place, key=f"{stem}/{number}", items=items)

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one item: a file, or a cell of a Parquet file."""
        embedded = _EMBEDDED.fullmatch(item.path)
        if embedded is None:
            return read_item_file(resolve_item(self._root, item.path))
        table, column = embedded.groups()
        path = resolve_item(self._root, table)
        cell = self._row_groups.read(path, column, item.offset)
        return item_bytes(cell, path.parent, column, f"row {item.offset} of {path}")

    def _items(
        self, file: TableFile, columns: TableColumns, row: Row, place: str, embedded: tuple[str, int]
    ) -> dict[str, tuple[str, int]]:
        """Return modality -> path and offset of the item of a row; a modality whose cell is empty is left out."""
        table, number = embedded
        items = {}
        for modality, column in columns.items.items():
            if column in columns.embedded:
                items[modality] = f"{table}{COLUMN_MARK}{column}", number
            elif path := self._written_path(file, row.get(column), place, modality, column):
                items[modality] = path, 0
        return items

    def _written_path(self, file: TableFile, cell: Any, place: str, modality: str, column: str) -> str:
        """Return the path of an item as stored, given its cell; an empty one for an empty cell."""
        if cell is None or cell == "":
            return ""
        if not isinstance(cell, str):
            raise SourceError(
                f"{place}: expected a path in column {column}, got {cell!r:.60}; name another column with "
                f"--item-column {modality}=COLUMN"
            )
        return item_path(self._root_text, self._settings.root or file.stem.rpartition("/")[0], cell)


def _find_files(location: Path) -> list[Path]:
    if not is_folder(location, TABLE_SUFFIXES):
        if file_size(location) is None:
            raise PathError(f"expected a table or a folder, got {location}, which does not exist; check the path")
        return [location]
    names = [name for name in walk_files(location) if has_suffix(name, TABLE_SUFFIXES)]
    if not names:
        raise PathError(f"{location}: expected {', '.join(sorted(TABLE_SUFFIXES))} files, got none; check the path")
    return [location / name for name in names]
