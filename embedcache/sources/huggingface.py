"""Hugging Face `datasets`: a folder written by `save_to_disk`, a dataset in memory, or one of the Hub.

    hf:org/name[config][split]@revision

Brackets and revision may be left out. The only bracket is the config or, if there is no config of that name, the split.
Splits are joined and sliced as `load_dataset` does: `[train+test]`, `[train[:10%]]`. The name may also be a folder that
holds the files of a repository of the Hub.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import hub_errors
from embedcache.modalities import FileItem, Sample
from embedcache.registry import require
from embedcache.settings import replace_fields
from embedcache.sources.open import SourceSettings
from embedcache.sources.table import (
    BATCH_ROWS,
    COLUMN_MARK,
    COLUMN_SETTINGS,
    ITEM_NAMES,
    Row,
    TableColumns,
    TableFile,
    find_columns,
    item_bytes,
    read_sample,
)

_MEMORY = "memory:"
_TIMEOUT_S = 30
_EXPECTED = (
    "expected a Dataset or DatasetDict, a folder written by its save_to_disk, or a name on the Hub such as "
    "hf:org/name[config][split]@revision"
)
_NAME = re.compile(
    r"(?P<name>[^\[\]@]+)(\[(?P<config>[^\[\]]*)\])?(\[(?P<split>([^\[\]]|\[[^\[\]]*\])+)\])?(@(?P<revision>[^\[\]@]+))?"
)


class HuggingfaceSource:
    """One sample per row of a `Dataset`, or of each split of a `DatasetDict` in turn.

    Images are a column with the feature `Image`, else one with a usual name; recordings, videos, point clouds, captions
    and keys follow the rules of tables (`embedcache.sources.table`). A class label becomes the name of its
    class. In a `DatasetDict`, and where splits are named, keys are `<split>/<cell of the key column, else row>` and the
    column `split` names the split, unless the dataset has such a column. An item is a split and a row. The location is
    a `Dataset` or `DatasetDict`, which cannot be reopened, or the path or name of one.
    """

    def __init__(self, location: object, settings: SourceSettings) -> None:
        settings.check_supported("huggingface", *COLUMN_SETTINGS)
        self._settings = settings

        name = _DatasetName.parse(location) if isinstance(location, str) else None
        splits = _by_split(location if name is None else _load(name))
        self._path = _describe_memory(splits) if name is None else name.text
        self._folder = Path.cwd() if name is None or not name.is_folder else Path(name.name)

        self._tables: dict[str, tuple[TableFile, TableColumns]] = {}
        self._cells = {}

        for split, dataset in splits.items():
            schema = dataset.features.arrow_schema
            path = Path(self._path, split)
            table = TableFile(path=path, schema=schema, read=partial(_rows, dataset), has_path_lists=False)
            columns = find_columns(table, _with_image(settings, dataset))
            self._tables[split] = table, columns

            # A column is read without the others, which may be large.
            cells = dataset.with_format("arrow")
            for column in columns.items.values():
                self._cells[f"{split}{COLUMN_MARK}{column}"] = cells.select_columns([column])

    def describe(self) -> Mapping[str, Any]:
        """Return what reopens the source; for a dataset in memory, its fingerprint."""
        return {"type": "huggingface", "path": self._path, "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over all rows. Memory holds one batch of rows, without images."""
        for split, (table, columns) in self._tables.items():
            names = [name for name in columns.to_read() if name not in columns.items.values()]
            for number, row in enumerate(table.rows(names)):
                yield _sample(split, columns, number, row, f"{table.path} row {number}")

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one item as stored, without decoding it."""
        split, _, column = item.path.rpartition(COLUMN_MARK)

        try:
            cell = self._cells[item.path][item.offset].column(0)[0].as_py()
        except (KeyError, IndexError):
            raise ItemError(f"{self._path} has no item in row {item.offset} of {item.path!r}") from None

        return item_bytes(cell, self._folder, column, f"row {item.offset} of {Path(self._path, split)}")


def _sample(split: str, columns: TableColumns, number: int, row: Row, place: str) -> Sample:
    items = {modality: [(f"{split}{COLUMN_MARK}{column}", number)] for modality, column in columns.items.items()}
    sample = read_sample(columns, row, place, key=str(number), items=items)
    if not split:
        return sample

    return replace(sample, key=f"{split}/{sample.key}", columns={"split": split, **sample.columns})


@dataclass(frozen=True, kw_only=True)
class _DatasetName:
    """A parsed location.

    Args:
        text: the whole location, with the absolute path of a folder.
        name: the name on the Hub or the absolute path of a folder.
    """

    text: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, location: str) -> "_DatasetName":
        if location.startswith(_MEMORY):
            place = f"in memory ({location.removeprefix(_MEMORY)})"
            raise SourceError(f"the dataset was {place}: pass it to open_source(dataset), or save it with save_to_disk")

        if Path(location).exists():
            path = Path(location).absolute().as_posix()
            return cls(text=path, name=path)

        found = _NAME.fullmatch(location)
        if found is None:
            raise SourceError(f"{location!r} is no name of a dataset; {_EXPECTED}")

        # A local folder wins over a name on the Hub.
        name = Path(found["name"]).absolute().as_posix() if Path(found["name"]).exists() else found["name"]
        text = name + location.removeprefix(found["name"])
        return cls(text=text, name=name, config=found["config"], split=found["split"], revision=found["revision"])

    @property
    def is_folder(self) -> bool:
        return Path(self.name).exists()


def _load(name: _DatasetName) -> Any:
    """Open a saved dataset, memory-mapped; or download one from the Hub, or read a copy of its files."""
    datasets = require("datasets", extra="datasets")
    error_class = SourceError if name.is_folder else PathError
    with hub_errors(f"load the dataset {name.text}", _EXPECTED, error_class=error_class):
        if name.text == name.name and name.is_folder:
            return datasets.load_from_disk(name.name, keep_in_memory=False)

        hub = require("huggingface_hub", extra="datasets")
        if not name.is_folder and not hub.constants.HF_HUB_OFFLINE:
            # If the Hub is down, `load_dataset` tries for half a minute; of a private one, it says less.
            hub.HfApi().dataset_info(name.name, revision=name.revision, timeout=_TIMEOUT_S)

        return _load_repository(datasets, name)


def _load_repository(datasets: Any, name: _DatasetName) -> Any:
    config = name.config or None
    split = name.split
    if config is not None and split is None:  # the only bracket
        configs = datasets.get_dataset_config_names(name.name, revision=name.revision)
        config, split = (config, None) if config in configs else (None, config)

    if split is None:
        return datasets.load_dataset(name.name, config, revision=name.revision)

    parts = [part.strip() for part in split.split("+")]
    names = [part.partition("[")[0] for part in parts]
    if len(set(names)) < len(names):
        raise SourceError(f"{name.text}: expected each split once, as keys are numbered in it, got {split}")

    loaded = datasets.load_dataset(name.name, config, split=parts, revision=name.revision)
    return datasets.DatasetDict(zip(names, loaded, strict=True))


def _by_split(loaded: Any) -> dict[str, Any]:
    """Return the datasets by the name of their split; "" for a single dataset."""
    datasets = require("datasets", extra="datasets")
    if isinstance(loaded, datasets.Dataset):
        return {"": loaded}
    if isinstance(loaded, datasets.DatasetDict):
        return dict(loaded)
    raise SourceError(f"{_EXPECTED}, got an object of type {type(loaded).__name__}")


def _describe_memory(splits: Mapping[str, Any]) -> str:
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
    named = [name for name in images if name.lower() in ITEM_NAMES["image"]]
    preferred = {"image": (named or images)[0]} if images else {}
    return replace_fields(settings, item_columns={**preferred, **settings.item_columns})
