"""Write vectors of a cache for other tools: one row per sample, with its key, caption and columns."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.lib import format as npy_format

from embedcache.arrays import Array, Bools, Ints, blocks, normalize
from embedcache.dataset.inputs import features_by_modality
from embedcache.dataset.pairs import ANY_LANGUAGE, is_language
from embedcache.dataset.vectors import Vectors
from embedcache.dataset.where import samples_within
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError, pluralize, summary
from embedcache.files import URL_PATTERN, AnyPath, building, is_url
from embedcache.modalities import IMPORTED_SOURCE, MODALITIES, count_items
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import add_digest, new_output, to_metadata
from embedcache.registry import unknown_name
from embedcache.runs import PAIR, Run
from embedcache.settings import merge_settings
from embedcache.sources.open import SOURCES
from embedcache.sources.table import INTERVAL_NAMES
from embedcache.store.cache import Cache, RowReader
from embedcache.store.layout import SAMPLES
from embedcache.vectors.opening import ARRAYS, VECTOR_COLUMNS
from embedcache.vectors.settings import VectorExportSettings

if TYPE_CHECKING:
    from embedcache.options import VectorExportOptions

_OF_ONE_FILE = ("table", IMPORTED_SOURCE)  # or of a folder of files
_ROWS_PER_FILE = 1_000_000
_BLOCK = 2**15
_UNIT_TOLERANCE = 1e-3  # rounding to float16 is half as much


@dataclass(frozen=True, kw_only=True)
class VectorExportReport:
    """Result of an export of vectors.

    Args:
        num_rows: number of rows, one per sample.
        left_out: samples and items of the cache that are not in the rows, in a few words; empty if none.

    Example:
        >>> import embedcache
        >>> report = embedcache.export_vectors("parquet", "cache", "captions.parquet", modality="text")
        >>> report.line()
        "captions.parquet: 40 rows; left out: 1 caption beyond a sample's first"
    """

    path: Path
    num_rows: int
    left_out: str

    __repr__ = summary

    def line(self) -> str:
        """Return a summary in one line."""
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        return f"{self.path}: {pluralize(self.num_rows, 'row')}{left_out}"


def export_vectors(
    format_name: str,
    cache: AnyPath,
    out: AnyPath,
    settings: VectorExportSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["VectorExportOptions"],
) -> VectorExportReport:
    """Write the vectors of a cache, with keys, captions and columns, for another tool; whole or not at all.

    A row is a sample that has a vector of each exported modality. It has the vector of the sample's first item.
    Memory: the sample of each item, and a block of 32,768 rows.

    Args:
        format_name: `clip-retrieval`, `npy` or `parquet`.
        cache: path or URL of the cache.
        out: a new `.parquet` file for `parquet`, else a new folder.
        settings: features, run, selection, condition.
        progress: progress in rows.
        options: settings by their names on the command line, which replace the values of `settings`.

    Example:
        >>> import embedcache, numpy
        >>> embedcache.export_vectors("npy", "cache", "arrays").num_rows
        39
        >>> numpy.load("arrays/text.npy").shape
        (39, 32)

    Raises:
        UnknownNameError: there is no such format, feature or language.
        SettingError: a modality that the format does not have.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the run was trained on other features.
        DataError: no sample has all requested vectors.
        PathError: the file or folder exists.
    """
    writers: dict[str, Callable[[VectorExport, Path, Progress], None]] = {
        "clip-retrieval": _write_clip_retrieval,
        "npy": _write_npy,
        "parquet": _write_parquet,
    }
    if format_name not in writers:
        raise unknown_name("export format", format_name, writers)

    allowed = ARRAYS if format_name == "clip-retrieval" else VECTOR_COLUMNS
    settings = merge_settings(VectorExportSettings, settings, options)
    export = VectorExport(cache, settings, allowed=tuple(allowed.values()))

    out = Path(out)
    num_rows = len(export.samples)
    progress = to_progress(progress)
    progress.start("writing", num_rows, "rows")
    writers[format_name](export, out, progress)
    progress.finish()
    return VectorExportReport(path=out, num_rows=num_rows, left_out=export.left_out)


def _write_parquet(export: "VectorExport", path: Path, progress: Progress) -> None:
    """Write one Parquet file with vectors as lists of one length, as they are in the cache."""
    if path.suffix != ".parquet":
        raise PathError(f"{path}: expected a name that ends in .parquet, got {path.suffix or 'no suffix'}")

    def tables() -> Iterator[pa.Table]:
        for table, vectors in export.rows(slice(0, len(export.samples)), progress):
            for modality, vectors_BD in vectors.items():
                components = pa.array(vectors_BD.reshape(-1))
                lists = pa.FixedSizeListArray.from_arrays(components, vectors_BD.shape[1])
                table = _set_column(table, f"{modality}_vector", lists)
            yield table

    with new_output(path) as temporary:
        _write_tables(temporary, tables(), export.record)


def _set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return a table with a column, in the place of an earlier one of that name, or else as the last."""
    if name in table.column_names:
        return table.set_column(table.schema.get_field_index(name), name, values)
    return table.append_column(name, values)


def _write_npy(export: "VectorExport", folder: Path, progress: Progress) -> None:
    """Write a `.npy` per modality, as it is in the cache, and `rows.parquet`."""
    num_rows = len(export.samples)
    with building(folder) as temporary:
        # The header of a .npy file has the number of its rows, which is known before the first is written.
        arrays = {modality: temporary / f"{modality}.npy" for modality in export.modalities}
        rows = export.rows(slice(0, num_rows), progress)
        _write_arrays(temporary / "rows.parquet", arrays, rows, num_rows, export.record)


def _write_clip_retrieval(export: "VectorExport", folder: Path, progress: Progress) -> None:
    """Write the folder of clip-retrieval, as its version 2.45 writes and reads it.

        img_emb/img_emb_00.npy  text_emb/text_emb_00.npy  metadata/metadata_00.parquet

    Row i of all files with one number describes one sample. Vectors have length 1. A row whose length differs by more
    than 0.001 is scaled, and other rows are kept as they are, so that an import of such files is exported bit for bit.
    """
    names = {modality: name for name, modality in ARRAYS.items() if modality in export.modalities}
    parts = list(blocks(len(export.samples), _ROWS_PER_FILE))
    # clip-retrieval sorts files by name, so all numbers have as many digits.
    digits = int(math.log10(len(parts))) + 1

    with building(folder) as temporary:
        for name in (*names.values(), "metadata"):
            (temporary / name).mkdir()
        for number, rows in enumerate(parts):
            suffix = f"{number:0{digits}d}"
            arrays = {modality: temporary / name / f"{name}_{suffix}.npy" for modality, name in names.items()}
            table = temporary / "metadata" / f"metadata_{suffix}.parquet"
            unit_rows = map(_to_clip_retrieval, export.rows(rows, progress))
            _write_arrays(table, arrays, unit_rows, rows.stop - rows.start, export.record)


def _to_clip_retrieval(rows: "_Rows") -> "_Rows":
    """Scale vectors to length 1; clip-retrieval's own columns have no nulls."""
    table, vectors = rows
    for name in ("image_path", "caption"):
        if name in table.column_names:
            table = _set_column(table, name, pc.fill_null(table[name], ""))

    unit_vectors = {}
    for modality, vectors_BD in vectors.items():
        # Lengths in float32: squares of float16 lose digits.
        lengths_B = np.linalg.norm(vectors_BD.astype(np.float32), axis=1)
        is_off_B = np.abs(lengths_B - 1) > _UNIT_TOLERANCE
        unit_BD = vectors_BD.copy()
        unit_BD[is_off_B] = normalize(vectors_BD[is_off_B])
        unit_vectors[modality] = unit_BD
    return table, unit_vectors


_Rows = tuple[pa.Table, dict[Modality, Array]]
"""Keys, captions and columns of some rows, and their vectors."""


def _write_arrays(
    table: Path, arrays: Mapping[Modality, Path], rows: Iterator[_Rows], num_rows: int, record: Mapping[str, Any]
) -> None:
    """Write a table, and `.npy` files in format 1.0: a header of 128 bytes, one line that other readers parse."""
    with ExitStack() as stack:
        files = {modality: stack.enter_context(path.open("wb")) for modality, path in arrays.items()}

        # Vectors are written while the table is, so that a block is read once.
        def tables() -> Iterator[pa.Table]:
            for part, vectors in rows:
                for modality, vectors_BD in vectors.items():
                    _append_rows(files[modality], vectors_BD, num_rows)
                yield part

        _write_tables(table, tables(), record)


def _append_rows(file: BinaryIO, vectors_BD: Array, num_rows: int) -> None:
    """Append vectors to a `.npy` file, after its header if it is empty."""
    if not file.tell():
        descr = vectors_BD.dtype.newbyteorder("<").str
        header = {"descr": descr, "fortran_order": False, "shape": (num_rows, vectors_BD.shape[1])}
        npy_format.write_array_header_1_0(file, header)
    file.write(vectors_BD.tobytes())


def _write_tables(path: Path, tables: Iterator[pa.Table], record: Mapping[str, Any]) -> None:
    """Write tables of one schema, one row group each, with checksums of pages."""
    first = next(tables)
    schema = first.schema.with_metadata(to_metadata(add_digest(record)))
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        writer.write_table(first.cast(schema))
        # Every block gets the schema of the first one, with its metadata.
        for table in tables:
            writer.write_table(table.cast(schema))


class VectorExport:
    """The rows of an export, in the order of the cache: samples that have a vector of each exported modality.

    A row has a sample's first item of each modality. `left_out` describes the samples and items that are in no row.
    Memory: the sample of each item, and a block of each table.

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
        allowed: Sequence[Modality] = tuple(VECTOR_COLUMNS.values()),
    ) -> None:
        self.cache = Cache(cache_path)
        self._settings = settings or VectorExportSettings()
        self._vectors = _open_exported(self.cache, self._settings, allowed)
        requested_S = samples_within([self.cache], self._settings.selection, self._settings.where)
        if requested_S is None:
            requested_S = np.setdiff1d(np.arange(len(self.cache)), self.cache.removed, assume_unique=True)
        self._num_requested = len(requested_S)

        # A sample without a usable item of one modality has no row.
        self._items = {}
        self.samples: Ints = requested_S
        """(S,) int64 rows of the cache's samples, ascending."""
        for modality in self._vectors:
            self._items[modality] = _first_items(self._samples_of[modality], self._is_usable(modality))
            self.samples = np.intersect1d(self.samples, self._items[modality][0], assume_unique=True)
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
        """The samples and items of the cache that are in no row, in a few words; empty if there are none."""
        parts = []
        num_samples = self._num_requested - len(self.samples)
        if num_samples:
            parts.append(f"{pluralize(num_samples, 'sample')} without a vector")

        for modality in self.modalities:
            item_samples = self._samples_of[modality][self._is_usable(modality)]
            num_items = int(np.isin(item_samples, self.samples).sum()) - len(self.samples)
            if num_items:
                counted = pluralize(num_items, "caption") if modality == "text" else count_items(num_items, modality)
                parts.append(f"{counted} beyond a sample's first")
        return ", ".join(parts)

    @property
    def record(self) -> dict[str, Any]:
        """Provenance as JSON values: the cache, its rows, and the encoder of each feature."""
        features = {}
        for modality, vectors in self._vectors.items():
            feature = vectors.feature
            features[modality] = {"name": feature.name, "spec": feature.spec, "fingerprint": feature.fingerprint}
        return {
            "cache": str(self.cache.path),
            "index_digest": self.cache.info.index_digest,
            "features": features,
            "run": self._settings.run and str(self._settings.run),
        }

    def rows(self, rows: slice, progress: Progress) -> Iterator[_Rows]:
        """Iterate over some rows in blocks: the table of each, and its vectors (B, D) of each modality, verified."""
        for block in blocks(rows.stop - rows.start, _BLOCK):
            part = slice(rows.start + block.start, rows.start + block.stop)
            yield self.table(part), {modality: self._read(modality, part) for modality in self.modalities}
            progress.advance(part.stop - part.start)

    def _read(self, modality: Modality, rows: slice) -> Array:
        """Return vectors as stored, or float16 of length 1 if a run projects them."""
        item_rows = self._item_rows(modality, rows)
        vectors = self._vectors[modality]
        if self._settings.run is None:
            return vectors.feature.read(item_rows).values
        return vectors.read(item_rows).astype(np.float16)

    def table(self, rows: slice) -> pa.Table:
        """Return `key`, then as far as they exist `image_path`, `caption`, `language`, and all columns of some rows.

        Other files are in `audio_path` and so on, with `start_s` and `stop_s`. Fast for rows that ascend from call to
        call.
        """
        samples = self._readers[SAMPLES].take(self.samples[rows])
        columns = {"key": samples["key"]}
        for modality in self.modalities:
            if MODALITIES[modality].kind == "files":
                items = self._readers[modality].take(self._item_rows(modality, rows))
                columns[f"{modality}_path"] = self._paths(items)
                if MODALITIES[modality].has_interval:
                    columns |= {name: items[name] for name in INTERVAL_NAMES}

        if "text" in self._readers:
            captions = self._captions(rows)
            columns["caption"] = captions["text"]
            columns["language"] = captions["language"]

        # A column of the user does not replace one of ours.
        for name, values in zip(samples.column_names, samples.columns, strict=True):
            columns.setdefault(name, values)
        return pa.table(columns)

    @cached_property
    def _readers(self) -> Mapping[str, RowReader]:
        return {name: RowReader(self.cache, name, kept_rows=0) for name in (SAMPLES, *self.cache.info.num_items)}

    @cached_property
    def _samples_of(self) -> Mapping[str, Ints]:
        """Sample of each item of a modality, ascending: (N,) int64."""
        samples = {}
        for modality in self.cache.info.num_items:
            samples[modality] = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return samples

    def _is_usable(self, modality: str) -> Bools:
        """Return which items have a vector and the requested language: (N,) bool."""
        is_usable_N = np.ones(self.cache.info.num_items[modality], bool)
        if modality in self._vectors:
            is_usable_N &= self._vectors[modality].feature.valid

        # A language selects captions. Items of other modalities have none.
        language = self._settings.language
        if modality == "text" and language not in (None, ANY_LANGUAGE):
            is_usable_N &= is_language([self.cache], str(language))
        return is_usable_N

    def _item_rows(self, modality: Modality, rows: slice) -> Ints:
        """Return the row of the item of each of these samples: (B,) int64, ascending."""
        samples, item_rows = self._items[modality]
        return item_rows[np.searchsorted(samples, self.samples[rows])]

    def _captions(self, rows: slice) -> pa.Table:
        """Return the caption of each row, null if the sample has none."""
        samples, caption_rows = self._first_captions
        position_B = np.minimum(np.searchsorted(samples, self.samples[rows]), len(samples) - 1)
        has_caption_B = samples[position_B] == self.samples[rows]

        # Captions are read once for each row that has one; the others take a null.
        captions = self._readers["text"].take(caption_rows[position_B][has_caption_B])
        return captions.take(pa.array(np.cumsum(has_caption_B) - 1, mask=~has_caption_B))

    @cached_property
    def _first_captions(self) -> tuple[Ints, Ints]:
        return self._items.get("text") or _first_items(self._samples_of["text"], self._is_usable("text"))

    def _paths(self, items: pa.Table) -> pa.ChunkedArray:
        """Return absolute paths if the items are files, URLs as they are; otherwise the stored paths."""
        paths = items["path"]
        root = _file_root(self.cache.info.source)
        if not root:
            return paths
        # A removed sample has an empty path.
        is_whole = pc.match_substring_regex(paths, f"^(/|$|{URL_PATTERN})")
        return pc.if_else(is_whole, paths, pc.utf8_replace_slice(paths, 0, 0, f"{root}/"))


def _file_root(source: Mapping[str, Any]) -> str:
    """Return the local folder that a source's paths of files are relative to; empty if there is none."""
    kind = str(source.get("type", ""))
    path = str(source.get("path", ""))
    root = str(source.get("settings", {}).get("root", "")) if kind == "coco" else path
    # Items of an archive or a data set are members, not files.
    has_files = kind in SOURCES and getattr(SOURCES.load(kind), "items_are_files", False)
    if not has_files or is_url(root):
        return ""

    # The table may be gone by now, so its kind decides unless a folder is there.
    is_file = Path(root).is_file() or (kind in _OF_ONE_FILE and not Path(root).is_dir())
    return str(Path(root).parent) if is_file else root


def _open_exported(
    cache: Cache, settings: VectorExportSettings, allowed: Sequence[Modality]
) -> dict[Modality, Vectors]:
    """Open the vectors of the requested modalities that the cache has features of.

    Raises:
        SettingError: the requested modality is not one of `allowed`.
        DataError: the cache has no features of them.
        UnknownNameError: there is no feature of a name.
    """
    if settings.modality not in (None, *allowed):
        raise SettingError(f"modality: expected {' or '.join(allowed)} for this format, got {settings.modality}")
    requested = [modality for modality in allowed if settings.modality in (None, modality)]
    modalities = list(filter(cache.features, requested))
    if settings.run is not None:
        # A run projects its own two modalities only.
        run_modalities = Run.open(settings.run, kind=PAIR).modalities
        modalities = [modality for modality in modalities if modality in run_modalities]
    if not modalities:
        raise DataError(f"{cache.path}: expected features of {' or '.join(requested)}, got none; check the cache")

    features = features_by_modality(cache, settings.features)
    for modality, names in features.items():
        if modality not in modalities:
            raise SettingError(
                f"feature: expected features of {' and '.join(modalities)}, got {'+'.join(names)} of {modality}"
            )

    vectors = {}
    for modality in modalities:
        name = "+".join(features[modality]) if modality in features else None
        vectors[modality] = Vectors(cache, modality, name, settings.run, device=settings.device)
    return vectors


def _first_items(samples_N: Ints, is_usable_N: Bools) -> tuple[Ints, Ints]:
    """Return the samples that have a usable item, ascending, and the row of the first of each: two (S,) int64."""
    rows = np.flatnonzero(is_usable_N)
    samples, first_positions = np.unique(samples_N[rows], return_index=True)
    return samples, rows[first_positions]
