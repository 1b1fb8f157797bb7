"""What an export writes: one row per sample, with its key, caption and columns, and one vector per modality."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints, distinct
from embedcache.dataset.inputs import features_by_modality
from embedcache.dataset.pairs import ANY_LANGUAGE, is_language
from embedcache.dataset.selections import read_selection
from embedcache.dataset.vectors import Vectors
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError, pluralize
from embedcache.files import URL_PATTERN, AnyPath, is_url
from embedcache.interop.settings import VectorExportSettings
from embedcache.interop.vector_files import rechunk
from embedcache.modalities import MODALITIES, count_items
from embedcache.outputs import check_output
from embedcache.runs import PAIR, Run
from embedcache.samples import IMPORTED_SOURCE
from embedcache.sources.open import SOURCES
from embedcache.sources.table import INTERVAL_NAMES
from embedcache.store.cache import Cache, RowReader
from embedcache.store.layout import SAMPLES

MODALITY_NAMES: Sequence[Modality] = tuple(modality.name for modality in MODALITIES.values())
IMAGES_AND_TEXTS: Sequence[Modality] = ("image", "text")
_OF_ONE_FILE = ("table", IMPORTED_SOURCE)  # or of a folder of files


class VectorExport:
    """The rows of an export, in the order of the cache: samples that have a vector of each exported modality.

    A row holds a sample's first item of each modality; `left_out` describes what the rows do not hold. Memory: the
    sample of each item, and a block of each table.

    Args:
        cache_path: path or URL of the cache.
        settings: which vectors, and of which samples.
        allowed: modalities that the format has.

    Raises:
        SettingError: the format does not have the requested modality.
        UnknownNameError: there is no such feature or language, or several features and none is named.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the run was trained on other features.
        DataError: the cache has no features, or no sample has all requested vectors.
    """

    def __init__(
        self,
        cache_path: AnyPath,
        settings: VectorExportSettings | None = None,
        *,
        allowed: Sequence[Modality] = MODALITY_NAMES,
    ) -> None:
        self.cache = Cache(cache_path)
        self._settings = settings = settings or VectorExportSettings()
        self._vectors = open_exported(self.cache, settings, allowed)
        self._items = {
            modality: _first_items(self._samples_of[modality], self._is_usable(modality)) for modality in self._vectors
        }
        requested_S = np.setdiff1d(np.arange(len(self.cache)), self.cache.removed, assume_unique=True)
        if settings.selection is not None:
            requested_S = read_selection(settings.selection, [self.cache])
        self._num_requested = len(requested_S)
        with_vectors = [samples for samples, _ in self._items.values()]
        self.samples: Ints = reduce(partial(np.intersect1d, assume_unique=True), with_vectors, requested_S)
        """(S,) int64 rows of the cache's samples, ascending."""
        if not len(self.samples):
            raise DataError(
                f"{self.cache.path}: expected samples with {' and '.join(self._vectors)} vectors, got none among "
                f"{self._num_requested:,} requested samples"
            )

    @property
    def modalities(self) -> list[Modality]:
        """Modalities of the exported vectors, images first."""
        return list(self._vectors)

    @property
    def left_out(self) -> str:
        """What of the cache the rows do not hold, in a few words; empty if nothing."""
        num_samples = self._num_requested - len(self.samples)
        parts = [f"{pluralize(num_samples, 'sample')} without a vector"] * bool(num_samples)
        for modality in self.modalities:
            items = self._samples_of[modality][self._is_usable(modality)]
            num_items = int(np.isin(items, self.samples).sum()) - len(self.samples)
            counted = pluralize(num_items, "caption") if modality == "text" else count_items(num_items, modality)
            parts += [f"{counted} beyond a sample's first"] * bool(num_items)
        return ", ".join(parts)

    @property
    def record(self) -> dict[str, Any]:
        """Provenance as JSON values: the cache, its rows, and the encoder of each feature."""
        features = {
            modality: {
                "feature": vectors.feature.name,
                "spec": vectors.feature.spec,
                "fingerprint": vectors.feature.fingerprint,
            }
            for modality, vectors in self._vectors.items()
        }
        run = self._settings.run
        return {
            "cache": str(self.cache.path),
            "index_digest": self.cache.info.index_digest,
            "features": features,
            "run": None if run is None else str(run),
        }

    def width(self, modality: Modality) -> int:
        """Return the number of dimensions of the vectors."""
        return self._vectors[modality].width

    def dtype(self, modality: Modality) -> str:
        """Return the dtype of the vectors: as stored, or float16 if a run projects them."""
        return "float16" if self._settings.run is not None else str(self._vectors[modality].feature.dtype)

    def item_rows(self, modality: Modality, rows: slice = slice(None)) -> Ints:
        """Return the row of the item of each of these samples: (S,) int64, ascending."""
        samples, item_rows = self._items[modality]
        return item_rows[np.searchsorted(samples, self.samples[rows])]

    def vectors(self, modality: Modality, size: int) -> Iterator[Array]:
        """Iterate over the vectors in arrays of `size` rows, checksums verified. Memory: a chunk and two arrays."""
        return rechunk(self._chunks(modality), size)

    def table(self, rows: slice) -> pa.Table:
        """Return `key`, and where they exist `image_path`, `caption`, `language`, and all columns of some rows.

        Recordings are in `audio_path` and so on, with `start_s` and `stop_s`. Fast for rows that ascend from call to
        call.
        """
        samples = self._readers[SAMPLES].take(self.samples[rows])
        columns = {"key": samples["key"]}
        for modality in self.modalities:
            if MODALITIES[modality].kind == "files":
                items = self._readers[modality].take(self.item_rows(modality, rows))
                columns[f"{modality}_path"] = self._paths(items)
                columns |= {name: items[name] for name in INTERVAL_NAMES if MODALITIES[modality].has_interval}
        if "text" in self._readers:
            captions = self._captions(rows)
            columns["caption"] = captions["text"]
            columns["language"] = captions["language"]
        others = [name for name in samples.column_names if name not in columns]
        return pa.table({**columns, **{name: samples[name] for name in others}})

    @cached_property
    def _readers(self) -> Mapping[str, RowReader]:
        return {name: RowReader(self.cache, name, kept_rows=0) for name in (SAMPLES, *self.cache.info.num_items)}

    @cached_property
    def _samples_of(self) -> Mapping[str, Ints]:
        """Sample of each item of a modality, ascending: (N,) int64."""
        return {
            modality: self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
            for modality in self.cache.info.num_items
        }

    def _is_usable(self, modality: str) -> Bools:
        """Return which items have a vector and the requested language: (N,) bool."""
        is_usable_N = np.ones(self.cache.info.num_items[modality], bool)
        if modality in self._vectors:
            is_usable_N &= self._vectors[modality].feature.valid
        language = self._settings.language
        if modality == "text" and language not in (None, ANY_LANGUAGE):
            is_usable_N &= is_language([self.cache], str(language))
        return is_usable_N

    def _chunks(self, modality: Modality) -> Iterator[Array]:
        wanted, vectors, size = self.item_rows(modality), self._vectors[modality], self.cache.info.chunk_size
        for number in distinct(wanted // size).tolist():
            if self._settings.run is None:
                rows, inputs = vectors.feature.chunk(number)
                values = inputs.values
            else:
                rows, values = vectors.chunk(number)
            low, high = np.searchsorted(wanted, [number * size, (number + 1) * size])
            yield values[np.searchsorted(rows, wanted[low:high])].astype(self.dtype(modality), copy=False)

    def _captions(self, rows: slice) -> pa.Table:
        """Return the caption of each row, null if the sample has none."""
        caption_rows, has_caption = self._caption_rows(rows)
        captions = self._readers["text"].take(caption_rows[has_caption])
        return captions.take(pa.array(np.cumsum(has_caption) - 1, mask=~has_caption))

    def _caption_rows(self, rows: slice) -> tuple[Ints, Bools]:
        """Return the row of the first caption of each sample, and whether it has one: two (S,)."""
        samples, first = self._first_captions
        position = np.minimum(np.searchsorted(samples, self.samples[rows]), len(samples) - 1)
        return first[position], samples[position] == self.samples[rows]

    @cached_property
    def _first_captions(self) -> tuple[Ints, Ints]:
        if "text" in self._items:
            return self._items["text"]
        return _first_items(self._samples_of["text"], self._is_usable("text"))

    def _paths(self, items: pa.Table) -> pa.ChunkedArray:
        """Return absolute paths where the items are files, URLs as they are; otherwise the stored paths."""
        paths, root = items["path"], _file_root(self.cache.info.source)
        if not root:
            return paths
        is_whole = pc.match_substring_regex(paths, f"^(/|$|{URL_PATTERN})")  # a removed sample has an empty path
        return pc.if_else(is_whole, paths, pc.utf8_replace_slice(paths, 0, 0, f"{root}/"))


def _file_root(source: Mapping[str, Any]) -> str:
    """Return the local folder that a source's paths of files are relative to; empty if there is none."""
    kind, path = str(source.get("type", "")), str(source.get("path", ""))
    root = str(source.get("settings", {}).get("root", "")) if kind == "coco" else path
    of_class = kind in SOURCES and getattr(SOURCES.load(kind), "items_are_files", False)
    if not of_class or is_url(root):
        return ""
    is_file = Path(root).is_file() or (kind in _OF_ONE_FILE and not Path(root).is_dir())
    return str(Path(root).parent) if is_file else root


def open_exported(cache: Cache, settings: VectorExportSettings, allowed: Sequence[Modality]) -> dict[Modality, Vectors]:
    """Open the vectors of the requested modalities that the cache has features of.

    Raises:
        SettingError: the requested modality is not one of those allowed.
        DataError: the cache has no features of them.
        UnknownNameError: there is no feature of a name.
    """
    if settings.modality not in (None, *allowed):
        raise SettingError(f"modality: expected {' or '.join(allowed)} for this format, got {settings.modality}")
    requested = [modality for modality in allowed if settings.modality in (None, modality)]
    if settings.run is not None:
        run = Run.open(settings.run, kind=PAIR)
        requested = [modality for modality in requested if modality in run.modalities] or requested
    modalities = [modality for modality in requested if cache.features(modality)]
    if not modalities:
        is_imported = cache.info.source.get("type") == IMPORTED_SOURCE
        step = "import both into a new cache" if is_imported else "add some with embedcache extract"
        raise DataError(f"{cache.path}: expected {' or '.join(requested)} features, got none; {step}")
    features = {modality: "+".join(names) for modality, names in features_by_modality(cache, settings.features).items()}
    for modality, name in features.items():
        if modality not in modalities and cache.features(modality):
            raise SettingError(f"feature: expected features of {' and '.join(modalities)}, got {name} of {modality}")
        if modality not in modalities:
            raise UnknownNameError(f"unknown {modality} feature {name!r}: {cache.path} has no {modality} features")
    return {
        modality: Vectors(cache, modality, features.get(modality), settings.run, device=settings.device)
        for modality in modalities
    }


def _first_items(samples_N: Ints, is_usable_N: Bools) -> tuple[Ints, Ints]:
    """Return the samples that have a usable item, ascending, and the row of the first of each: two (S,) int64."""
    rows = np.flatnonzero(is_usable_N)
    samples, first = np.unique(samples_N[rows], return_index=True)
    return samples, rows[first]


def check_new_file(path: Path, suffix: str) -> None:
    """Check that an output has this suffix and may be written; see `check_output`."""
    if path.suffix != suffix:
        raise PathError(f"{path}: expected a name that ends in {suffix}, got {path.suffix or 'no suffix'}")
    check_output(path)
