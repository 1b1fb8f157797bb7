"""Hugging Face `datasets`: a folder written by `save_to_disk`, a dataset in memory, or the name of one on the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.modalities import MODALITIES
from embedcache.registry import require
from embedcache.sources.base import FileItem, Sample
from embedcache.sources.captions import to_scalar_columns
from embedcache.sources.files import read_item_file
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table import (
    IMAGE_NAMES,
    ITEM_SETTINGS,
    TEXT_SETTINGS,
    TableColumns,
    embedded_path,
    find_columns,
    read_interval,
    read_key,
    read_texts,
    split_embedded,
)
from embedcache.sources.table_files import BATCH_ROWS, Row, TableFile, arrow_table

_MEMORY = "memory:"
_EXPECTED = "expected a Dataset or DatasetDict, a folder written by its save_to_disk, or a name on the Hub (org/name)"


class HuggingfaceSource:
    """One sample per row of a `Dataset`, or of each split of a `DatasetDict` in turn.

    Images are a column with the feature `Image`, else one found as in a table (`embedcache.sources.table`); recordings,
    videos, point clouds, captions and keys follow the rules of tables. A class label becomes the name of its class. In
    a `DatasetDict`, keys are `<split>/<cell of the key column, else row>` and the column `split` names the split,
    unless the dataset has such a column. An item is a split and a row. The location is a `Dataset` or `DatasetDict`,
    which cannot be reopened, or the path or name of one.
    """

    def __init__(self, location: object, settings: SourceSettings) -> None:
        settings.check_supported("huggingface", *ITEM_SETTINGS, *TEXT_SETTINGS)
        self._settings = settings
        splits = _by_split(_load(location) if isinstance(location, str) else location)
        self._path = _describe(location, splits)
        self._folder = Path(self._path) if Path(self._path).is_dir() else Path.cwd()
        self._tables: dict[str, tuple[TableFile, TableColumns]] = {}
        self._cells = {}
        for split, dataset in splits.items():
            schema = dataset.features.arrow_schema
            table = arrow_table(Path(self._path, split), schema, partial(_rows, dataset))
            columns = find_columns(table, _with_image(settings, dataset))
            self._tables[split] = table, columns
            cells = dataset.with_format("arrow")
            for column in columns.media.values():
                self._cells[embedded_path(split, column)] = cells.select_columns([column])
            if columns.image is not None:
                self._cells[split] = cells.select_columns([columns.image])

    def describe(self) -> Mapping[str, Any]:
        """Return what reopens the source; for a dataset in memory, its fingerprint."""
        return {"type": "huggingface", "path": self._path, "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over all rows. Memory holds one batch of rows, without images."""
        for split, (table, columns) in self._tables.items():
            names = [name for name in columns.to_read() if name not in (columns.image, *columns.media.values())]
            for number, row in enumerate(table.rows(names)):
                yield _sample(split, columns, number, row, f"{table.path} row {number}")

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one item as stored, without decoding it."""
        try:
            cell = self._cells[item.path][item.offset].column(0)[0].as_py()
        except (KeyError, IndexError):
            raise ItemError(f"{self._path} has no {_kind(item)} in row {item.offset} of split {item.path!r}") from None
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(data, bytes):
            return data
        if isinstance(path, str) and path:
            return read_item_file(self._folder / path)
        raise ItemError(f"no {_kind(item)} in row {item.offset} of {Path(self._path, item.path)}")


def _kind(item: FileItem) -> str:
    return "image" if split_embedded(item.path)[1] is None else "item"


def _sample(split: str, columns: TableColumns, number: int, row: Row, location: str) -> Sample:
    key = read_key(columns, row, location) or str(number)
    start_s, stop_s = read_interval(columns, row, location)
    files = {}
    for modality, column in columns.media.items():
        bounds = (start_s, stop_s) if MODALITIES[modality].has_interval else (None, None)
        path = embedded_path(split, column)
        files[modality] = (FileItem(path=path, offset=number, start_s=bounds[0], stop_s=bounds[1]),)
    return Sample(
        key=f"{split}/{key}" if split else key,
        images=() if columns.image is None else (FileItem(path=split, offset=number),),
        texts=read_texts(columns, row, location),
        columns=({"split": split} if split else {}) | to_scalar_columns({name: row[name] for name in columns.others}),
        files=files,
    )


def _load(location: str) -> Any:
    """Open a saved dataset, memory-mapped, or download one from the Hub."""
    if location.startswith(_MEMORY):
        raise SourceError(
            f"the source was a dataset in memory ({location.removeprefix(_MEMORY)}) and cannot be reopened; pass it to "
            "open_source(dataset) again, or save it with save_to_disk and use that folder"
        )
    datasets = require("datasets", extra="datasets")
    is_saved = Path(location).exists()
    try:
        if is_saved:
            return datasets.load_from_disk(location, keep_in_memory=False)
        return datasets.load_dataset(location)
    except (OSError, ValueError, LookupError, TypeError) as error:
        if is_saved:
            raise SourceError(f"{location} cannot be read as a saved dataset: {error}; {_EXPECTED}") from None
        raise PathError(f"no folder {location}, and no such dataset on the Hub: {error}; {_EXPECTED}") from None


def _by_split(loaded: Any) -> dict[str, Any]:
    """Return the datasets by the name of their split; "" for a single dataset."""
    datasets = require("datasets", extra="datasets")
    if isinstance(loaded, datasets.Dataset):
        return {"": loaded}
    if isinstance(loaded, datasets.DatasetDict):
        return dict(loaded)
    raise SourceError(f"{_EXPECTED}, got an object of type {type(loaded).__name__}")


def _describe(location: object, splits: Mapping[str, Any]) -> str:
    if isinstance(location, str):
        return Path(location).absolute().as_posix() if Path(location).exists() else location
    return _MEMORY + ",".join(f"{split}={dataset._fingerprint}".lstrip("=") for split, dataset in splits.items())


def _rows(dataset: Any, columns: Sequence[str]) -> Iterator[Row]:
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    kind = require("datasets", extra="datasets").ClassLabel  # stored as numbers; missing labels are -1 or None
    features = {name: dataset.features[name] for name in columns}
    classes = {name: dict(enumerate(f.names)) for name, f in features.items() if isinstance(f, kind)}
    for batch in dataset.with_format("arrow").select_columns(list(columns)).iter(BATCH_ROWS):
        for row in batch.to_pylist():
            yield row | {name: names.get(row[name]) for name, names in classes.items()}


def _with_image(settings: SourceSettings, dataset: Any) -> SourceSettings:
    """Prefer columns with the feature `Image` over columns that only have a usual name for images."""
    kind = require("datasets", extra="datasets").Image
    images = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    named = [name for name in images if name.lower() in IMAGE_NAMES]
    return replace(settings, image_column=settings.image_column or next(iter(named or images), None))
