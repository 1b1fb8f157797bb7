"""Hugging Face `datasets`: a folder that `save_to_disk` wrote, a dataset in memory, or the name of one on the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.registry import require
from embedcache.sources.base import ImageItem, Sample
from embedcache.sources.captions import scalar_columns
from embedcache.sources.files import read_file
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table import IMAGE_NAMES, TableColumns, find_columns, row_key, row_texts
from embedcache.sources.table_files import BATCH_ROWS, Row, TableFile, arrow_table

_MEMORY = "memory:"
_GIVE = "give a Dataset or DatasetDict, a folder that its save_to_disk wrote, or a dataset's name on the Hub (org/name)"


class HuggingfaceSource:
    """The rows of a `Dataset`, or of each split of a `DatasetDict`, one after the other; each is a sample.

    Images are a column of the feature `Image`, else those of a table (`embedcache.sources.table`), whose rules for
    captions and keys hold here, too. A class label becomes the name of its class. In a `DatasetDict` a key is
    `<split>/<cell of the key column, else row>` and the column `split` names the split, unless rows have one of
    their own. An item is a split and a row.

    Args:
        location: a `Dataset` or `DatasetDict`, or the path or name of one. One in memory cannot be opened again
            from its description.
        settings: `image_column`, `caption_columns`, `key_column`.

    Raises:
        MissingExtraError: `datasets` is not installed.
        PathError: there is no such dataset.
        SourceError: it cannot be read, streams, or lacks a column.
    """

    def __init__(self, location: object, settings: SourceSettings) -> None:
        settings.allow_only("huggingface", "image_column", "caption_columns", "key_column")
        self._settings = settings
        splits = _by_split(_load(location) if isinstance(location, str) else location)
        self._path = _describe(location, splits)
        self._folder = Path(self._path) if Path(self._path).is_dir() else Path.cwd()
        self._tables = {split: _table(dataset, Path(self._path, split)) for split, dataset in splits.items()}
        self._columns = {
            split: find_columns(self._tables[split], _with_image(settings, dataset))
            for split, dataset in splits.items()
        }
        self._images = {
            split: dataset.with_format("arrow").select_columns([columns.image])
            for (split, dataset), columns in zip(splits.items(), self._columns.values(), strict=True)
            if columns.image is not None
        }

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it; for a dataset in memory, its fingerprint."""
        return {"type": "huggingface", "path": self._path, "settings": self._settings.given()}

    def samples(self) -> Iterator[Sample]:
        """Go through all rows. Memory holds one batch of rows, without images."""
        for split, table in self._tables.items():
            columns = self._columns[split]
            names = [name for name in columns.to_read() if name != columns.image]
            for number, row in enumerate(table.rows(names)):
                yield _sample(split, columns, number, row, f"{table.path} row {number}")

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image as they are stored: nothing is decoded."""
        try:
            cell = self._images[item.path][item.offset].column(0)[0].as_py()
        except (KeyError, IndexError):
            raise ItemError(f"{self._path} has no image in row {item.offset} of split {item.path!r}") from None
        data, path = _stored(cell)
        if isinstance(data, bytes):
            return data
        if path:
            return read_file(self._folder / path)
        raise ItemError(f"no image in row {item.offset} of {Path(self._path, item.path)}")


def _sample(split: str, columns: TableColumns, number: int, row: Row, place: str) -> Sample:
    key = row_key(columns, row, place) or str(number)
    return Sample(
        key=f"{split}/{key}" if split else key,
        images=() if columns.image is None else (ImageItem(path=split, offset=number),),
        texts=row_texts(columns, row, place),
        columns=({"split": split} if split else {}) | scalar_columns({name: row[name] for name in columns.others}),
    )


def _stored(cell: Any) -> tuple[Any, Any]:
    """Give the bytes and the path in a cell, each where there is one."""
    if isinstance(cell, dict):
        return cell.get("bytes"), cell.get("path")
    return (None, cell) if isinstance(cell, str) else (cell, None)


def _load(location: str) -> Any:
    """Open a saved dataset, memory-mapped, or one of the Hub, which is fetched where it is not there yet."""
    if location.startswith(_MEMORY):
        raise SourceError(
            f"the source was a dataset in memory ({location.removeprefix(_MEMORY)}), which only the program that made "
            "it has: give it again with open_source(dataset), or save it with save_to_disk and give that folder"
        )
    datasets = require("datasets", extra="datasets")
    is_saved = Path(location).exists()
    try:
        if is_saved:
            return datasets.load_from_disk(location, keep_in_memory=False)
        return datasets.load_dataset(location)
    except (OSError, ValueError, LookupError, TypeError) as error:
        if is_saved:
            raise SourceError(f"{location} cannot be read as a saved dataset: {error}; {_GIVE}") from None
        raise PathError(f"no folder {location}, and no such dataset from the Hub: {error}; {_GIVE}") from None


def _by_split(given: Any) -> dict[str, Any]:
    """Give the datasets by the name of their split, "" for one without."""
    datasets = require("datasets", extra="datasets")
    if isinstance(given, datasets.Dataset):
        return {"": given}
    if isinstance(given, datasets.DatasetDict):
        return dict(given)
    raise SourceError(f"a {type(given).__name__} is no source whose rows can be read again by number; {_GIVE}")


def _describe(location: object, splits: Mapping[str, Any]) -> str:
    if isinstance(location, str):
        return Path(location).absolute().as_posix() if Path(location).exists() else location
    return _MEMORY + ",".join(f"{split}={dataset._fingerprint}".lstrip("=") for split, dataset in splits.items())


def _table(dataset: Any, path: Path) -> TableFile:
    return arrow_table(path, dataset.features.arrow_schema, partial(_rows, dataset))


def _rows(dataset: Any, columns: Sequence[str]) -> Iterator[Row]:
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    classes = _class_names(dataset, columns)
    for batch in dataset.with_format("arrow").select_columns(list(columns)).iter(BATCH_ROWS):
        for row in batch.to_pylist():
            yield row | {name: names.get(row[name]) for name, names in classes.items()}


def _class_names(dataset: Any, columns: Sequence[str]) -> dict[str, dict[int, str]]:
    """Give the columns of class labels: column -> number -> name of the class. What has no label has -1 or none."""
    kind = require("datasets", extra="datasets").ClassLabel
    features = {name: dataset.features[name] for name in columns}
    return {name: dict(enumerate(feature.names)) for name, feature in features.items() if isinstance(feature, kind)}


def _with_image(settings: SourceSettings, dataset: Any) -> SourceSettings:
    """Take a column of the feature `Image`, whatever its name, before one that is only named as images are."""
    kind = require("datasets", extra="datasets").Image
    images = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    usual = [name for name in images if name.lower() in IMAGE_NAMES]
    return replace(settings, image_column=settings.image_column or next(iter(usual or images), None))
