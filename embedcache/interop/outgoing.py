"""What an export writes: one row a sample, with its keys, captions and columns, and a vector of each modality.

Exports are new files and folders, whole or absent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints
from embedcache.dataset.selections import read_selection
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.files import disk_errors, flush, is_url, make_folder, partial_path
from embedcache.interop.incoming import recut
from embedcache.registry import unknown_name
from embedcache.search.vectors import Vectors
from embedcache.store.cache import Cache

MODALITIES: Sequence[Modality] = ("image", "text")
_WITH_FILES = ("folder", "table")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What of a cache is exported.

    Args:
        image: the image feature; None is the run's, or the only one.
        text: the text feature, alike.
        only: export vectors of this modality alone; None is of all that have features.
        run: project the features with this run.
        selection: of these samples only.
        language: take captions of this language only.
    """

    image: str | None = None
    text: str | None = None
    only: Modality | None = None
    run: Path | None = None
    selection: Path | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        named = {"image": self.image, "text": self.text}
        for modality, name in named.items():
            if name is not None and self.only not in (None, modality):
                raise SettingError(
                    f"--{modality}-feature names a feature and --modality {self.only} leaves it out; give one"
                )


class Outgoing:
    """The rows of an export, in the order of the cache: samples that have a vector of each exported modality.

    A row holds a sample's first image and its first caption; `left_out` says what is not among the rows. Memory: the
    cache's tables.

    Args:
        cache_path: the cache.
        settings: what of it.

    Raises:
        UnknownNameError: no feature or language is named so, or several features and none is named.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the run was trained on other features.
        DataError: the cache has no features, or no sample has all that is asked.
    """

    def __init__(self, cache_path: Path | str, settings: ExportSettings) -> None:
        self.cache = Cache(cache_path)
        self._settings = settings
        names = {"image": settings.image, "text": settings.text}
        self._vectors = {
            modality: Vectors(cache_path, modality, names[modality], settings.run)
            for modality in _exported(self.cache, settings)
        }
        self._items = {
            modality: _first_items(self._tables[modality], self._is_usable(modality)) for modality in self._vectors
        }
        self.samples = self._choose(settings.selection)
        """(M,) int64 rows of the cache's samples, ascending."""

    @property
    def modalities(self) -> list[Modality]:
        """Of which vectors are exported."""
        return [modality for modality in MODALITIES if modality in self._vectors]

    @property
    def left_out(self) -> str:
        """Say in a few words what of the cache the rows do not hold; empty where nothing."""
        num_samples = self._num_asked - len(self.samples)
        parts = [f"{num_samples:,} samples without a vector"] * bool(num_samples)
        for modality in self.modalities:
            items = self._tables[modality]["sample"].to_numpy()[self._is_usable(modality)]
            num_items = int(np.isin(items, self.samples).sum()) - len(self.samples)
            word = "captions" if modality == "text" else "images"
            parts += [f"{num_items:,} {word} beyond a sample's first"] * bool(num_items)
        return ", ".join(parts)

    @property
    def about(self) -> dict[str, Any]:
        """Say what was exported, as JSON: the cache, its rows, and what made each feature."""
        features = {
            modality: {"feature": vectors.side.name, "spec": vectors.side.spec, "fingerprint": vectors.side.fingerprint}
            for modality, vectors in self._vectors.items()
        }
        run = self._settings.run
        return {
            "cache": str(self.cache.path),
            "spine": self.cache.info.index_digest,
            "features": features,
            "run": None if run is None else str(run),
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What the schema of a Parquet file remembers of an export."""
        return {"embedcache": json.dumps(self.about)}

    def width(self, modality: Modality) -> int:
        """Numbers in a vector."""
        return self._vectors[modality].width

    def dtype(self, modality: Modality) -> str:
        """Of the vectors: as they are stored; float16 where a run projects them."""
        return "float16" if self._settings.run is not None else str(self._vectors[modality].side.dtype)

    def item_rows(self, modality: Modality) -> Ints:
        """Give the row of each sample's item: (M,) int64, ascending."""
        samples, rows = self._items[modality]
        return rows[np.searchsorted(samples, self.samples)]

    def vectors(self, modality: Modality, size: int) -> Iterator[Array]:
        """Go through the vectors in arrays of `size` rows, checksums compared. Memory: a chunk and two such arrays.

        Raises:
            CorruptError: bytes differ from their checksum.
        """
        return recut(self._stream(modality), size)

    def table(self, rows: slice) -> pa.Table:
        """Give `key`, `image_path`, `caption`, `language` where there are such, and all columns of some rows."""
        samples = self.cache.samples.take(pa.array(self.samples[rows]))
        columns = {"key": samples["key"]}
        if "image" in self._vectors:
            images = self._tables["image"].take(pa.array(self.item_rows("image")[rows]))
            columns["image_path"] = self._image_paths(images)
        if "text" in self._tables:
            captions = self._captions(rows)
            columns["caption"] = captions["text"]
            if captions["language"].null_count < len(captions):
                columns["language"] = captions["language"]
        others = [name for name in samples.column_names if name not in columns]
        return pa.table({**columns, **{name: samples[name] for name in others}})

    @cached_property
    def _tables(self) -> Mapping[str, pa.Table]:
        return {modality: self.cache.items(modality) for modality in self.cache.info.num_items}

    def _is_usable(self, modality: str) -> Bools:
        """Say which items have a vector, and are of the language: (N,) bool."""
        table, usable = self._tables[modality], np.ones(self.cache.info.num_items[modality], bool)
        if modality in self._vectors:
            usable &= self._vectors[modality].side.valid
        if modality == "text" and self._settings.language is not None:
            usable &= _is_language(table, self._settings.language)
        return usable

    def _choose(self, selection: Path | None) -> Ints:
        samples = np.arange(self.cache.info.num_samples)
        if selection is not None:
            samples = read_selection(selection, [self.cache])
        self._num_asked = len(samples)
        for having, _ in self._items.values():
            samples = np.intersect1d(samples, having)
        if not len(samples):
            raise DataError(
                f"no sample of {self.cache.path} that is asked for has {' and '.join(self._vectors)} vectors"
            )
        return samples

    def _stream(self, modality: Modality) -> Iterator[Array]:
        wanted, vectors, size = self.item_rows(modality), self._vectors[modality], self.cache.info.chunk_size
        for number in np.unique(wanted // size).tolist():
            if self._settings.run is None:
                rows, inputs = vectors.side.chunk(number)
                values = inputs.values
            else:
                rows, values = vectors.chunk(number)
            low, high = np.searchsorted(wanted, [number * size, (number + 1) * size])
            yield values[np.searchsorted(rows, wanted[low:high])].astype(self.dtype(modality), copy=False)

    def _captions(self, rows: slice) -> pa.Table:
        """Give the caption of each row, null where the sample has none."""
        table = self._tables["text"]
        if "text" in self._vectors:
            return table.take(pa.array(self.item_rows("text")[rows]))
        having, first = _first_items(table, self._is_usable("text"))
        place = np.minimum(np.searchsorted(having, self.samples[rows]), max(len(having) - 1, 0))
        is_there = having[place] == self.samples[rows] if len(having) else np.zeros(len(place), bool)
        return table.take(pa.array(first[place] if len(having) else place, mask=~is_there))

    def _image_paths(self, images: pa.Table) -> pa.ChunkedArray:
        """Give whole paths where the images are files of their own, below a folder or a table; else as they are."""
        source = self.cache.info.source
        if source.get("type") not in _WITH_FILES or is_url(source["path"]):
            return images["path"]
        path = Path(source["path"])
        root = path if path.is_dir() else path.parent
        is_relative = pc.and_(pc.equal(images["length"], 0), pc.invert(pc.starts_with(images["path"], "/")))
        is_relative = pc.and_(is_relative, pc.greater(pc.utf8_length(images["path"]), 0))
        whole = pc.binary_join_element_wise(f"{root}/", images["path"], "")
        return pc.if_else(is_relative, whole, images["path"])


def _exported(cache: Cache, settings: ExportSettings) -> list[Modality]:
    asked: Sequence[Modality] = MODALITIES if settings.only is None else (settings.only,)
    found = [modality for modality in asked if cache.features(modality)]
    if not found:
        raise DataError(
            f"{cache.path} has no {' and no '.join(asked)} features to export; add some with embedcache extract"
        )
    for modality, name in (("image", settings.image), ("text", settings.text)):
        if name is not None and modality not in found:
            raise UnknownNameError(f"{cache.path} has no {modality} features, so none is named {name!r}")
    return found


def _first_items(table: pa.Table, usable: Bools) -> tuple[Ints, Ints]:
    """Give the samples that have a usable item, ascending, and the row of the first of each: two (S,) int64."""
    rows = np.flatnonzero(usable)
    samples, first = np.unique(table["sample"].to_numpy()[rows], return_index=True)
    return samples, rows[first]


def _is_language(table: pa.Table, language: str) -> Bools:
    found: Bools = pc.equal(table["language"], language).to_numpy() == np.True_
    if not found.any():
        known = [str(name) for name in pc.unique(table["language"]).to_pylist() if name is not None]
        raise unknown_name("caption language", language, known)
    return found


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; after the block it is flushed and becomes `folder`, and after an error it is gone.

    Raises:
        PathError: `folder` is there and not empty, or is a file.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise PathError(f"{folder} is not empty, or no folder; give the path of a new one")
    make_folder(folder.parent)
    temporary = partial_path(folder)
    temporary.mkdir()
    try:
        with disk_errors(folder):
            yield temporary
            for path in temporary.rglob("*"):
                flush(path)
            temporary.rename(folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_file(path: Path, suffix: str) -> None:
    """Refuse to write over a file, or under a name that says something else.

    Raises:
        PathError: the file is there, or its name does not end so.
    """
    if path.suffix != suffix:
        raise PathError(f"{path} is no name for this file; end it in {suffix}")
    if path.exists():
        raise PathError(f"{path} is there already; give the path of a new file")
