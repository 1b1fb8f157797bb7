"""Tables of items and captions as a source: Parquet, CSV, TSV and JSONL files."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import open_path
from embedcache.modalities import MODALITIES
from embedcache.sources.base import FileItem, Sample
from embedcache.sources.captions import join_captions, to_scalar_columns
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
    embedded_path,
    find_columns,
    open_table_file,
    read_interval,
    read_key,
    read_texts,
    split_embedded,
)

_WHOLE = (None, None)
"""Interval of an item that is a whole file."""


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
        self._embedding = {path for path in self._files if path.suffix.lower() == ".parquet"}
        self._row_groups = RowGroups()
        self.shared_column: str | None = None
        self._image_column = lru_cache(maxsize=4096)(self._find_image_column)

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
            if columns.image not in columns.embedded and not self._settings.key_column:
                self.shared_column = columns.image
            for number, row in enumerate(file.rows(columns.to_read())):
                place = f"{file.path} row {number}"
                yield place, self._sample(file, columns, number, row, place)

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one item: a file, or a cell of a Parquet file."""
        table, named = split_embedded(item.path) if f".parquet{COLUMN_MARK}" in item.path else (item.path, None)
        path = resolve_item(self._root, table)
        if named is None and path not in self._embedding:
            return read_item_file(path)
        column = named or self._image_column(path)
        cell = self._row_groups.read(path, column, item.offset)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return data
        if isinstance(cell, dict) and cell.get("path"):
            return read_item_file(resolve_item(path.parent, cell["path"]))
        kind = "image" if named is None else "item"
        raise ItemError(f"no {kind} in column {column}: row {item.offset} of {path} is empty")

    def _sample(self, file: TableFile, columns: TableColumns, number: int, row: Row, place: str) -> Sample:
        key, items = read_key(columns, row, place), self._items(file, columns, number, row, place)
        return Sample(
            key=key or f"{relative_to(self._root_text, file.stem)}/{number}",
            images=items.pop("image", ()),
            texts=read_texts(columns, row, place),
            columns=to_scalar_columns({name: row.get(name) for name in columns.others}),
            files=items,
        )

    def _items(
        self, file: TableFile, columns: TableColumns, number: int, row: Row, place: str
    ) -> dict[str, tuple[FileItem, ...]]:
        """Return modality -> the item of a row; a modality whose cell is empty is left out."""
        items: dict[str, tuple[FileItem, ...]] = {}
        interval = read_interval(columns, row, place) if columns.media else _WHOLE
        for modality, column in columns.items.items():
            start_s, stop_s = interval if MODALITIES[modality].has_interval else _WHOLE
            if column in columns.embedded:
                table = relative_to(self._root_text, str(file.path))
                path, offset = table if modality == "image" else embedded_path(table, column), number
            else:
                path, offset = self._written_path(file, row.get(column), place, modality, column), 0
            if path:
                items[modality] = (FileItem(path=path, offset=offset, start_s=start_s, stop_s=stop_s),)
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

    def _find_image_column(self, path: Path) -> str:
        try:
            column = find_columns(open_table_file(path, delimiter=self._settings.delimiter), self._settings).image
        except (PathError, SourceError) as error:
            raise ItemError(str(error)) from None
        if column is None:
            raise ItemError(f"{path} has no image column")
        return column


def _find_files(location: Path) -> list[Path]:
    if not is_folder(location, TABLE_SUFFIXES):
        if file_size(location) is None:
            raise PathError(f"expected a table or a folder, got {location}, which does not exist; check the path")
        return [location]
    names = [name for name, _ in walk_files(location) if has_suffix(name, TABLE_SUFFIXES)]
    if not names:
        raise PathError(f"{location}: expected {', '.join(sorted(TABLE_SUFFIXES))} files, got none; check the path")
    return [location / name for name in names]
