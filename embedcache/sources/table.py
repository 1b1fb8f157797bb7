"""Tables of items and captions (Parquet, CSV, TSV, JSONL), and the roles of their columns."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SettingError, SourceError
from embedcache.files import is_remote, open_path
from embedcache.modalities import MODALITIES
from embedcache.sources.base import FileItem, Sample, TextItem
from embedcache.sources.captions import join_captions, parse_captions, to_scalar_columns, to_text_items
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
    restrict_reads,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import HEADER_ROWS, Row, RowGroups, TableFile, open_table_file

IMAGE_NAMES = (
    "image", "image_path", "path", "file", "filepath", "file_name", "filename", "image_name",
    "jpg", "jpeg", "png", "webp",
)  # fmt: skip
MEDIA_NAMES: Mapping[str, tuple[str, ...]] = {
    "audio": ("audio", "audio_path", "recording", "wav", "flac", "mp3", "ogg", "m4a", "opus"),
    "video": ("video", "video_path", "mp4", "mkv", "webm", "avi", "mov"),
    "points": ("points_path", "point_cloud", "lidar", "npz", "ply", "las"),
}
ITEM_SETTINGS = ("image_column", *(f"{modality}_column" for modality in MEDIA_NAMES))
TEXT_SETTINGS = ("caption_columns", "key_column", "omit_columns", "language_column")
INTERVAL_NAMES = ("start_s", "stop_s")
_WHOLE = (None, None)
"""Interval of an item that is a whole file."""
_COLUMN_MARK = "#"


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Roles of the columns of a table.

    Args:
        image: column of images.
        media: modality -> column of recordings, videos or point clouds.
        embedded: those columns of items that hold their bytes rather than their paths.
        interval: columns with the start and the end of recordings and videos, in seconds.
        others: columns kept as columns of the samples.
    """

    image: str | None
    media: Mapping[str, str]
    embedded: frozenset[str]
    interval: tuple[str | None, str | None]
    captions: tuple[str, ...]
    key: str | None
    language: str | None
    others: tuple[str, ...]

    @cached_property
    def items(self) -> Mapping[str, str]:
        """Modality -> column of its items, images first."""
        return {**({} if self.image is None else {"image": self.image}), **self.media}

    def to_read(self) -> list[str]:
        """Return the columns that indexing reads: all but the bytes of items."""
        paths = (name for name in self.items.values() if name not in self.embedded)
        names = (*paths, *self.interval, *self.captions, self.key, self.language, *self.others)
        return list(dict.fromkeys(name for name in names if name is not None))


def find_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of a table, and check that one of them contains items or captions."""
    columns = assign_columns(file, settings)
    if columns.image is None and not columns.captions and not columns.media:
        raise SourceError(
            f"{file.path} has no column with a usual name for images or captions; it has {_names(file)}; name them "
            "with --image-column and --caption-column, or --audio-column, --video-column and --points-column"
        )
    return columns


def assign_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of any table; SourceError if a column named in the settings does not fit."""
    media = _find_media(file, settings)
    images = [name for name in IMAGE_NAMES if settings.image_column or name not in map(str.lower, media.values())]
    image = _existing(file, settings.image_column, "--image-column") or _find(file, images)
    captions = settings.caption_columns or _find_captions(file.columns)
    for name in captions:
        _check_plain(file, _existing(file, name, "--caption-column"), "--caption-column")
    if image not in file.bytes_columns:
        _check_plain(file, image, "--image-column")
    key = _existing(file, settings.key_column, "--key-column") or _find(file, ("key", "id", "uid", "__key__"))
    language = _existing(file, settings.language_column, "--language-column") or _find(file, ("language", "lang"))
    _check_plain(file, settings.language_column, "--language-column")
    omitted = [_existing(file, name, "--omit-column") for name in settings.omit_columns]
    is_timed = "audio" in media or "video" in media
    interval = tuple(_find(file, [name]) if is_timed else None for name in INTERVAL_NAMES)
    reserved = "key"  # a column of the sample table itself
    used = {reserved, image, *media.values(), *interval, *captions, *omitted, key, language}
    return TableColumns(
        image=image,
        media=media,
        embedded=frozenset(name for name in (image, *media.values()) if name in file.bytes_columns),
        interval=(interval[0], interval[1]),
        captions=captions,
        key=key,
        language=language,
        others=tuple(name for name in file.plain_columns if name not in used),
    )


def read_rows(file: TableFile, columns: TableColumns, settings: SourceSettings) -> Iterator[tuple[TableColumns, Row]]:
    """Iterate over the rows of a table, each with the roles of the columns that are known by then.

    A field of a JSONL file that occurs after its first rows becomes a column of the samples from that row on, whatever
    follows, so that a file that grows keeps its first samples.

    Raises:
        SourceError: such a field has a name by which it would have another role, such as that of captions.
    """
    known = set(file.columns)
    for number, row in enumerate(file.rows(columns.to_read())):
        if file.has_late_columns and not row.keys() <= known:
            for name in [name for name in row if name not in known]:
                file, others = _with_field(file, name, settings, number)
                columns = replace(columns, others=(*columns.others, *others))
                known.add(name)
        yield columns, row


def _with_field(file: TableFile, name: str, settings: SourceSettings, number: int) -> tuple[TableFile, tuple[str, ...]]:
    """Return a JSONL file with one more field, and its name if it becomes a column of the samples."""
    wider = replace(file, columns=(*file.columns, name), plain_columns=(*file.plain_columns, name))
    before, after = assign_columns(file, settings), assign_columns(wider, settings)
    if replace(after, others=()) != replace(before, others=()):
        raise SourceError(
            f"{file.path} row {number}: expected the field {name!r}, which has the name of an item, a caption, a key, "
            f"a language or a time, in one of the first {HEADER_ROWS} rows too; add it to the first row, for instance "
            "as null, or rename it"
        )
    return wider, tuple(other for other in after.others if other == name)


def _find_media(file: TableFile, settings: SourceSettings) -> dict[str, str]:
    """Return modality -> column of recordings, videos and point clouds."""
    media = {}
    for modality, names in MEDIA_NAMES.items():
        option = f"--{modality}-column"
        column = _existing(file, getattr(settings, f"{modality}_column"), option) or _find(file, names)
        if column is not None:
            if column not in file.bytes_columns:
                _check_plain(file, column, option)
            media[modality] = column
    return media


def read_interval(columns: TableColumns, row: Row, location: str) -> tuple[float | None, float | None]:
    """Return the start and the end of a row's recording or video; the error for other cells starts with `location`."""
    start_s, stop_s = (
        None if name is None or row.get(name) in (None, "") else _seconds(row[name], f"{location}: {name}")
        for name in columns.interval
    )
    if stop_s is not None and stop_s <= (start_s or 0):
        raise SourceError(f"{location}: expected stop_s after start_s, got {start_s or 0:g} to {stop_s:g}")
    return start_s, stop_s


def _seconds(value: Any, location: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise SourceError(f"{location}: expected seconds of at least 0, got {value!r:.60}")
    return seconds


def embedded_path(path: str, column: str) -> str:
    """Return the path of items whose bytes are in a column other than that of images."""
    return f"{path}{_COLUMN_MARK}{column}"


def split_embedded(path: str) -> tuple[str, str | None]:
    """Return the path and the column of the result of `embedded_path`; None for any other path."""
    table, mark, column = path.rpartition(_COLUMN_MARK)
    return (table, column) if mark else (path, None)


def read_key(columns: TableColumns, row: Row, location: str) -> str | None:
    """Return the key of a row, or None without a key column. The error for an empty cell starts with `location`."""
    if columns.key is None:
        return None
    key = row.get(columns.key)
    if key is None or key == "":
        raise SourceError(f"{location} has no key in column {columns.key}")
    return str(key)


def read_texts(columns: TableColumns, row: Row, location: str) -> tuple[TextItem, ...]:
    """Return the captions of a row, with the language in its language column, if any.

    With several caption columns, blank cells are dropped unless all are blank: a row of a CSV file may have fewer
    captions than there are columns. The error for cells without captions starts with `location`.
    """
    cells = [parse_captions(row.get(name), f"{location}: {name}") for name in columns.captions]
    captions = [caption for cell in cells for caption in cell]
    if len(columns.captions) > 1:
        captions = [caption for caption in captions if caption.strip()] or captions
    language = row.get(columns.language) if columns.language else None
    return to_text_items(captions, None if language is None else str(language))


def _existing(file: TableFile, name: str | None, option: str) -> str | None:
    if name is not None and name not in file.columns:
        rows = f"the first {HEADER_ROWS} rows of " if file.has_late_columns else ""
        raise SourceError(f"{option} {name}: no such column in {rows}{file.path}; it has {_names(file)}")
    return name


def _names(file: TableFile) -> str:
    """Return the names of all columns; of a single one, a hint if it is a header with another delimiter."""
    names = ", ".join(file.columns) or "none"
    delimiter = next((repr(mark) for mark in ";\t|," if mark in names), "") if len(file.columns) == 1 else ""
    hint = f", one column; if {delimiter} separates them, give --delimiter {delimiter}"
    return names + hint if delimiter else names


def _check_plain(file: TableFile, name: str | None, option: str) -> None:
    if name is not None and name not in file.plain_columns:
        raise SourceError(
            f"column {name} of {file.path} holds values of another type; name another column with {option}; the table "
            f"has {', '.join(file.columns)}"
        )


def _find(file: TableFile, names: Sequence[str]) -> str | None:
    """Return the column whose name, ignoring case, comes first in `names`."""
    by_name = {column.lower(): column for column in reversed(file.columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _find_captions(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the caption columns: `caption`, `captions`, `caption_0`, …, else those named `text` or `sentence`."""
    for stem in ("caption", "text", "sentence"):
        matches = [name for name in columns if re.fullmatch(rf"{stem}s?(_?\d+)?", name, re.IGNORECASE)]
        if matches:
            return tuple(matches)
    return ()


class TableSource:
    """One sample per row of a table, or of all tables below a folder, sorted by path.

    Keys are the cells of the key column, else `<path of the file without suffix>/<row>`. A column of images,
    recordings, videos or point clouds holds bytes, a struct of `bytes` and `path` as Hugging Face writes it, or paths:
    absolute, URLs, or relative to the setting `root`, without it to the folder of the table. One column may serve two
    modalities, such as the audio and the video of an `.mp4`. Columns `start_s` and `stop_s` make each recording and
    video an interval; an empty cell is the beginning or the end. Fields of a JSONL file may be missing in any row;
    those that `read_rows` finds after its first 100 rows are columns too. Iterating over the samples reads no item.

    With the setting `key_column`, adjacent rows of one key that name the same items are one sample with the captions of
    all of them; see `join_captions`. Without it, `shared_column` is the column of the paths of images, of which several
    rows may name one.

    With the setting `inside_only`, an item outside the table's folder, after following links, or behind a URL is not
    read, and is a row with that reason: for a table that somebody else wrote.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("table", *ITEM_SETTINGS, *TEXT_SETTINGS, "delimiter", "root", "inside_only")
        root = settings.root and find_root(settings.root)
        self._settings = replace(settings, root=root)
        self._location = open_path(location).absolute()
        for place in (location, *([root] if root else [])):
            if settings.inside_only and is_remote(open_path(place)):
                raise SettingError(f"inside_only: expected local files, got {place}; copy them to this machine first")
        self._files = _find_files(self._location)
        self._root = self._location.parent if self._files == [self._location] else self._location
        self._root_text = str(self._root)
        self._allowed = [self._root, *([Path(root)] if root else [])]
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
            first = find_columns(file, self._settings)
            if first.image not in first.embedded and not self._settings.key_column:
                self.shared_column = first.image
            for number, (columns, row) in enumerate(read_rows(file, first, self._settings)):
                place = f"{file.path} row {number}"
                yield place, self._sample(file, columns, number, row, place)

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one item: a file, or a cell of a Parquet file."""
        if self._settings.inside_only:
            with restrict_reads(self._allowed):
                return self._read(item)
        return self._read(item)

    def _read(self, item: FileItem) -> bytes:
        table, named = split_embedded(item.path) if f".parquet{_COLUMN_MARK}" in item.path else (item.path, None)
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
        raise ItemError(f"no {'image' if named is None else 'item'} in column {column}, row {item.offset} of {path}")

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
                f"--{modality}-column"
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
