"""Tables of items and captions as a source: streamed rows of Parquet, CSV, TSV and JSONL, and the roles of columns."""

import csv
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, chain, islice
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import ItemError, PathError, SettingError, SourceError
from embedcache.files import TEXT_ENCODING, open_path, reading
from embedcache.modalities import MODALITIES, FileItem, Sample, TextItem
from embedcache.settings import replace_fields
from embedcache.sources.files import (
    TABLE_SUFFIXES,
    find_root,
    has_suffix,
    is_folder,
    item_path,
    join_captions,
    open_binary,
    parse_captions,
    parse_json_object,
    read_item_file,
    relative_to,
    require_file,
    resolve_item,
    to_scalar_columns,
    to_text_items,
    walk_files,
)
from embedcache.sources.open import SourceSettings

Row: TypeAlias = Mapping[str, Any]
BATCH_ROWS = 1024
_SAVE_AGAIN = "save it again, text as UTF-8"
_MAX_FILES = 4096  # files whose row group sizes stay in memory
HEADER_ROWS = 100
"""Rows at the beginning of a JSONL file, whose fields are its columns."""

ITEM_NAMES: Mapping[str, tuple[str, ...]] = {
    "audio": ("audio", "audio_path", "recording", "wav", "flac", "mp3", "ogg", "m4a", "opus"),
    "video": ("video", "video_path", "mp4", "mkv", "webm", "avi", "mov"),
    "points": ("points_path", "point_cloud", "lidar", "npz"),
    "image": (
        *("image", "image_path", "path", "file", "filepath", "file_name", "filename", "image_name"),
        *("jpg", "jpeg", "png", "webp"),
    ),
}
"""Modality -> usual names of the column of its items, lower case, the most likely first.

Images are last, so that a column named for another modality is not also a column of images.
"""
COLUMN_SETTINGS = ("item_columns", "caption_columns", "key_column", "omit_columns", "language_column")
INTERVAL_NAMES = ("start_s", "stop_s")
"""Names of the columns with the start and the end of recordings and videos, in seconds."""
COLUMN_MARK = "#"
"""Between the path of a table and the column that holds the bytes of items."""
_EMBEDDED = re.compile(rf"(.+?\.parquet){COLUMN_MARK}(.+)", re.IGNORECASE)
"""Path of an item whose bytes are in a column of a table."""


class TableSource:
    """One sample per row of a table, or of all tables below a folder, sorted by path.

    Keys are the cells of the key column, or `<path of the file without suffix>/<row>` without one. A column of images,
    recordings, videos or point clouds contains bytes, a struct of `bytes` and `path` as written by Hugging Face, or
    paths. A path is absolute, a URL, or relative to the setting `root`, by default the folder of the table. In JSONL
    and Parquet, a cell may also be a list of paths, the items of one sample. One column may serve two modalities, such
    as the audio and the video of an `.mp4`.

    Columns `start_s` and `stop_s` make each recording and video an interval. An empty cell is the beginning or the end.
    The columns of a JSONL file are the fields of its first 100 rows. Any row may lack some of them. Iterating over the
    samples reads no item.

    With the setting `key_column`, adjacent rows of one key that name the same items become one sample with all their
    captions. See `join_captions`.
    """

    items_are_files = True

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("table", *COLUMN_SETTINGS, "delimiter", "root")
        root = settings.root and find_root(settings.root)
        self._settings = replace_fields(settings, root=root)
        self._location = open_path(location).absolute()
        self._files = _find_files(self._location)
        self._root = self._location.parent if self._files == [self._location] else self._location
        self._root_text = str(self._root)
        self._row_group_starts = lru_cache(_MAX_FILES)(_row_group_starts)
        self._cells = lru_cache(2)(_read_row_group)
        self._lock = Lock()

    def describe(self) -> Mapping[str, Any]:
        return {"type": "table", "path": str(self._location), "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over all samples. Peak memory: one batch of rows, without embedded items, and the rows of a key."""
        if self._settings.key_column is None:
            return (sample for _, sample in self._rows())
        return join_captions(self._rows())

    def _rows(self) -> Iterator[tuple[str, Sample]]:
        """Iterate over all rows. Yields the place of each row, for errors, and its sample."""
        for path in self._files:
            file = open_table_file(path, delimiter=self._settings.delimiter)
            columns = find_columns(file, self._settings)
            table = relative_to(self._root_text, str(file.path))
            stem = relative_to(self._root_text, file.stem)
            folder = self._settings.root or file.stem.rpartition("/")[0]

            for number, row in enumerate(file.rows(columns.to_read())):
                place = f"{file.path} row {number}"
                items = {}
                for modality, column in columns.items.items():
                    if column in columns.embedded:
                        items[modality] = [(f"{table}{COLUMN_MARK}{column}", number)]
                        continue

                    cell = row.get(column)
                    places = []
                    for written_path in cell if isinstance(cell, list) else [cell]:
                        if written_path:
                            places.append((item_path(self._root_text, folder, str(written_path)), 0))
                    items[modality] = places
                yield place, read_sample(columns, row, place, key=f"{stem}/{number}", items=items)

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one item from its file or its cell of a Parquet file.

        The last two row groups are cached, so consecutive rows cost one read of their group. Peak memory: three row
        groups of a column of items.
        """
        embedded = _EMBEDDED.fullmatch(item.path)
        if embedded is None:
            return read_item_file(resolve_item(self._root, item.path))

        table, column = embedded.groups()
        path = resolve_item(self._root, table)
        row = item.offset

        # Only one thread reads at a time, as pyarrow reads a row group with several threads.
        with self._lock, reading(path, _SAVE_AGAIN, error_class=ItemError, damage_class=ItemError):
            starts = self._row_group_starts(path)
            if row >= starts[-1]:
                raise ItemError(f"no such row: {path} has {starts[-1]} rows, no row {row}")
            group = bisect_right(starts, row) - 1
            cells = self._cells(path, column, group)
        return item_bytes(cells[row - starts[group]].as_py(), path.parent, column, f"row {row} of {path}")


def _find_files(location: Path) -> list[Path]:
    if not is_folder(location, TABLE_SUFFIXES):
        require_file(location)
        return [location]

    paths = [location / name for name in walk_files(location) if has_suffix(name, TABLE_SUFFIXES)]
    if not paths:
        raise PathError(f"{location}: expected {', '.join(sorted(TABLE_SUFFIXES))} files, got none; check the path")
    return paths


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """A table whose rows are read in order.

    Args:
        path: the file, for errors.
        schema: names and types of the columns.
        read: function that iterates over the rows with the given columns.
        has_path_lists: whether a cell may contain a list of paths of items.
    """

    path: Path
    schema: pa.Schema
    read: Callable[[Sequence[str]], Iterator[Row]]
    has_path_lists: bool = True

    def __post_init__(self) -> None:
        for name, count in Counter(self.schema.names).items():
            if count > 1:
                raise SourceError(f"{self.path}: expected different columns, got {name!r} twice; rename one")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of the file."""
        return tuple(self.schema.names)

    @cached_property
    def bytes_columns(self) -> frozenset[str]:
        """Columns of bytes, or of structs with a field `bytes`, which may contain the items themselves."""
        return frozenset(self._columns_of(_has_bytes))

    @cached_property
    def item_columns(self) -> tuple[str, ...]:
        """Columns that may contain the bytes of items, or text or lists of text, which may be their paths."""
        return tuple(self._columns_of(self._has_items))

    @cached_property
    def plain_columns(self) -> tuple[str, ...]:
        """Columns of text, numbers, booleans, dates, times, durations, or lists of them."""
        return tuple(self._columns_of(_is_plain))

    @cached_property
    def stem(self) -> str:
        """Path without the suffix."""
        return str(self.path.with_suffix(""))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Iterate over the rows in order, reading only `columns`."""
        with reading(self.path, _SAVE_AGAIN, damage_class=SourceError):
            yield from self.read(columns)

    def _columns_of(self, is_suitable: Callable[[pa.DataType], bool]) -> list[str]:
        """Return the names of the columns of suitable types."""
        return [field.name for field in self.schema if is_suitable(field.type)]

    def _has_items(self, kind: pa.DataType) -> bool:
        is_list = self.has_path_lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        return _has_bytes(kind) or _is_text(kind.value_type if is_list else kind)


def open_table_file(path: Path, *, delimiter: str | None = None) -> TableFile:
    """Read the columns of a table file.

    A file whose suffix is not `.parquet` or `.jsonl` is a text table, such as CSV or TSV. Text tables have no types, so
    all their cells are text and a key `007` keeps its zeros.

    Args:
        path: the file.
        delimiter: character between the cells of a text table. If None, a comma, or a tab in `.tsv`.
    """
    suffix = path.suffix.lower()
    if delimiter is not None and suffix in (".parquet", ".jsonl"):
        raise SettingError(f"{path} has no delimiter, as it is no text table; omit --delimiter {delimiter!r}")

    with reading(path, _SAVE_AGAIN, damage_class=SourceError):
        if suffix == ".parquet":
            with open_parquet(path) as file:
                return TableFile(path=path, schema=file.schema_arrow, read=partial(_read_parquet, path))

        if suffix == ".jsonl":
            first_rows = islice(_read_jsonl(path), HEADER_ROWS)
            names = list(dict.fromkeys(chain.from_iterable(first_rows)))
            read: Callable[[Sequence[str]], Iterator[Row]] = partial(_read_jsonl, path)
        else:
            mark = delimiter or ("\t" if suffix == ".tsv" else ",")
            # Spaces after a delimiter are skipped if it is named, as in Flickr30k's table.
            form: dict[str, Any] = {"delimiter": mark, "skipinitialspace": delimiter is not None, "strict": True}
            names = next(_csv_lines(path, form), (0, []))[1]
            read = partial(_read_csv, path, form)

        return TableFile(path=path, schema=pa.schema([(name, pa.string()) for name in names]), read=read)


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a local or remote Parquet file. Only the parts that are accessed are read."""
    with open_binary(path) as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        yield parquet


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_all_field_indices("bytes"))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(is_string or pa.types.is_null(kind))


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)

    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    is_time = pa.types.is_temporal(kind) and not pa.types.is_interval(kind)
    return bool(_is_text(kind) or is_number or is_time or pa.types.is_boolean(kind))


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with open_parquet(path) as file:
        if not columns:
            for _ in range(file.metadata.num_rows):
                yield {}
            return

        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()


def _read_jsonl(path: Path, _columns: Sequence[str] = ()) -> Iterator[Row]:
    """Iterate over the objects of a JSONL file, with all their fields. Blank lines are skipped.

    Arrow's reader would convert the key 1 to 1.0 if another row has 1.5, convert text that looks like a date to a time,
    and refuse a row with a list of captions after a row with a single caption.
    """
    with path.open(encoding=TEXT_ENCODING) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parse_json_object(line, f"{path} line {number}")


def _read_csv(path: Path, form: Mapping[str, Any], _columns: Sequence[str]) -> Iterator[Row]:
    lines = _csv_lines(path, form)
    _, header = next(lines, (0, []))
    for number, cells in lines:
        if len(cells) != len(header):
            raise SourceError(f"{path} line {number}: expected {len(header)} cells, got {len(cells)}: {cells!r:.60}")
        yield dict(zip(header, cells, strict=True))


def _csv_lines(path: Path, form: Mapping[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Iterate over the rows of a text table, header first, each with the number of its last line. Skip blank lines.

    Arrow's reader cannot skip spaces after a delimiter. It would also join the rows between two stray quotes at the
    beginning of cells, without an error.
    """
    with path.open(encoding=TEXT_ENCODING, newline="") as file:
        lines = csv.reader(file, **form)
        try:
            for cells in lines:
                if cells:
                    yield lines.line_num, cells
        except csv.Error as error:
            raise SourceError(f"{path} line {lines.line_num}: {error}; correct the line") from None


def _row_group_starts(path: Path) -> list[int]:
    """Return the first row of each row group, and the number of rows."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return list(accumulate(sizes, initial=0))


def _read_row_group(path: Path, column: str, group: int) -> pa.ChunkedArray:
    with open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise ItemError(f"no column {column!r}: {path} has others")
        return file.read_row_group(group, columns=[column])[column]


def item_bytes(cell: Any, folder: Path, column: str, place: str) -> bytes:
    """Return the bytes of the item in a cell, or of the file that the cell names.

    Raises:
        ItemError: the cell is empty, or the file cannot be read.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        return data
    if isinstance(path, str) and path:
        return read_item_file(resolve_item(folder, path))
    raise ItemError(f"no item in column {column}: {place} is empty")


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Roles of the columns of a table.

    Args:
        items: modality -> column of its items.
        embedded: columns of items that contain their bytes rather than their paths.
        interval: columns with the start and the end of recordings and videos, in seconds.
        captions: columns of captions.
        key: column of the keys of samples.
        language: column of the language of a row's captions.
        others: columns that become columns of the samples.
    """

    items: Mapping[str, str]
    embedded: frozenset[str]
    interval: tuple[str | None, str | None]
    captions: tuple[str, ...]
    key: str | None
    language: str | None
    others: tuple[str, ...]

    def to_read(self) -> list[str]:
        """Return the columns that indexing reads, which are all columns except the bytes of items."""
        path_columns = [name for name in self.items.values() if name not in self.embedded]
        optional_columns = (*self.interval, *self.captions, self.key, self.language, *self.others)

        # One column may have several roles.
        names = dict.fromkeys(path_columns)
        for name in optional_columns:
            if name is not None:
                names[name] = None
        return list(names)


def find_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of a table, and check that one of them contains items or captions."""
    columns = assign_columns(file, settings)
    if not columns.items and not columns.captions:
        step = "name them with --item-column MODALITY=COLUMN and --caption-column"
        raise SourceError(f"{file.path} has no usual column of images or captions: {_names(file)}; {step}")
    return columns


def assign_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of any table.

    Raises:
        SourceError: a column named in the settings does not exist or has an unsuitable type.
    """
    items: dict[str, str] = {}
    for modality, names in ITEM_NAMES.items():
        # A column that was assigned to a modality before is not found again, but may be named.
        assigned_names = set(map(str.lower, items.values()))
        free_names = [name for name in names if name not in assigned_names]

        column = settings.item_columns.get(modality)
        if column is not None:
            _check(file, column, f"--item-column {modality}=COLUMN", file.item_columns)
        column = column or _find(file.item_columns, free_names)
        if column is not None:
            items[modality] = column

    captions = settings.caption_columns or _find_captions(file.columns)
    key = settings.key_column or _find(file.plain_columns, ("key", "id", "uid", "__key__"))
    language = settings.language_column or _find(file.plain_columns, ("language", "lang"))

    for option, columns in (("caption", captions), ("key", [key]), ("language", [language])):
        for name in filter(None, columns):
            _check(file, name, f"--{option}-column", file.plain_columns)
    for name in settings.omit_columns:
        _check(file, name, "--omit-column", file.columns)

    start = None
    stop = None
    if any(MODALITIES[modality].has_interval for modality in items):
        start, stop = (_find(file.columns, [name]) for name in INTERVAL_NAMES)

    # A sample table has a column `key` already.
    used_names = {"key", *items.values(), start, stop, *captions, *settings.omit_columns, key, language}
    others = [name for name in file.plain_columns if name not in used_names]
    return TableColumns(
        items=items,
        embedded=file.bytes_columns & set(items.values()),
        interval=(start, stop),
        captions=captions,
        key=key,
        language=language,
        others=tuple(others),
    )


def _check(file: TableFile, name: str, option: str, allowed: Collection[str]) -> None:
    """Check that the table has a column, and that it is one of the allowed columns."""
    if name not in file.columns:
        raise SourceError(f"{option} {name}: no such column in {file.path}; it has {_names(file)}")
    if name not in allowed:
        raise SourceError(f"column {name} of {file.path} holds other values; {option} may be one of: {_names(file)}")


def read_sample(
    columns: TableColumns, row: Row, place: str, *, key: str, items: Mapping[str, Sequence[tuple[str, int]]]
) -> Sample:
    """Return the sample of a row.

    Args:
        columns: roles of the columns.
        row: the cells of the row by column.
        place: location of the row, for errors.
        key: key of the sample if there is no key column.
        items: modality -> path and offset of each of its items.
    """
    start_s, stop_s = _read_interval(columns, row, place)
    files = {}
    for modality, places in items.items():
        if not places:
            continue

        # An interval is about the recordings and videos of the row, and not about its images.
        has_interval = MODALITIES[modality].has_interval
        start = start_s if has_interval else None
        stop = stop_s if has_interval else None
        files[modality] = tuple(FileItem(path=path, offset=at, start_s=start, stop_s=stop) for path, at in places)

    cells = map(row.get, columns.others)
    return Sample(
        key=_read_key(columns, row, place) or key,
        images=files.pop("image", ()),
        texts=_read_texts(columns, row, place),
        columns=to_scalar_columns(dict(zip(columns.others, cells, strict=True))),
        files=files,
    )


def _read_interval(columns: TableColumns, row: Row, location: str) -> tuple[float | None, float | None]:
    """Return the start and the end of a row's recording or video. The error for other cells starts with `location`."""
    start_column, stop_column = columns.interval
    cells = [row.get(start_column or ""), row.get(stop_column or "")]
    try:
        start_s, stop_s = map(_to_seconds, cells)
    except (TypeError, ValueError):
        start_s = -1.0  # refused below
        stop_s = None

    if not 0 <= (start_s or 0.0) < (inf if stop_s is None else stop_s) or stop_s == inf:
        raise SourceError(f"{location}: expected seconds with 0 <= start_s < stop_s, got {cells!r:.60}")
    return start_s, stop_s


def _to_seconds(cell: Any) -> float | None:
    return None if cell in (None, "") else float(cell)


def _read_key(columns: TableColumns, row: Row, location: str) -> str | None:
    """Return the key of a row, or None without a key column. The error for an empty cell starts with `location`."""
    if columns.key is None:
        return None

    key = row.get(columns.key)
    if key is None or key == "":
        raise SourceError(f"{location} has no key in column {columns.key}")
    return str(key)


def _read_texts(columns: TableColumns, row: Row, location: str) -> tuple[TextItem, ...]:
    """Return the captions of a row, with the language in its language column, if any.

    The error for cells without captions starts with `location`.
    """
    captions: list[str] = []
    for name in columns.captions:
        captions += parse_captions(row.get(name), f"{location}: {name}")

    # A row of a CSV file may have fewer captions than there are columns. If all are blank, it fails as blank.
    if len(columns.captions) > 1:
        captions = list(filter(str.strip, captions)) or captions

    language = row.get(columns.language) if columns.language else None
    return to_text_items(captions, None if language is None else str(language))


def _names(file: TableFile) -> str:
    """Return the names of all columns, with a hint if a single column seems to be a header with another delimiter."""
    names = ", ".join(file.columns) or "none"
    if len(file.columns) == 1:
        for delimiter in ";\t|,":
            if delimiter in names:
                return f"{names}, one column; if {delimiter!r} separates them, give --delimiter {delimiter!r}"
    return names


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column whose name, ignoring case, comes first in `names`."""
    # Of columns that differ in case only, the first one counts.
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in names:
        if name in by_name:
            return by_name[name]
    return None


def _find_captions(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the caption columns `caption`, `captions`, `caption_0`, …, else the same of `text` or `sentence`."""
    for stem in ("caption", "text", "sentence"):
        pattern = re.compile(rf"{stem}s?(_?\d+)?", re.IGNORECASE)
        matches = tuple(filter(pattern.fullmatch, columns))
        if matches:
            return matches
    return ()
