"""Import of vectors that other tools computed: a normal cache, written chunk by chunk."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import CorruptError, ItemError, SettingError, SourceError, UnfinishedError
from embedcache.files import AnyPath, open_path, remove_partials
from embedcache.modalities import IMPORTED_SOURCE, MODALITIES, FileItem, Sample, TextItem
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import IMPORTED, check_same, digest, digest_file, new_record_path, record_stage
from embedcache.settings import merge_settings
from embedcache.sources.files import read_item_file, resolve_item
from embedcache.sources.open import SourceSettings, remember
from embedcache.sources.table import Row, TableColumns, TableFile, assign_columns, open_table_file, read_sample
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit, hash_item
from embedcache.store.feature import EncoderGroup, Feature, create_group
from embedcache.store.indexing import index
from embedcache.store.layout import info_path, read_info
from embedcache.store.producer import FillReport, Output, Verb, fill
from embedcache.store.writer import ChunkFeatures, add_feature, withdraw
from embedcache.vectors.opening import GET_AGAIN, FileGroup, VectorImport
from embedcache.vectors.settings import ImportSettings

if TYPE_CHECKING:
    from embedcache.options import ImportOptions

_FEATURE = "vector"
_NO_VECTOR = "NaN or infinity in the imported vector"
_EMPTY = "empty caption"
_KEY_FORMAT = "{:09d}"
_NEXT_STEP = "restore the files and use the same options, or import into a new folder"


def import_vectors(
    vectors: VectorImport,
    cache: AnyPath,
    settings: ImportSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["ImportOptions"],
) -> list[FillReport]:
    """Write a normal cache of vectors that another tool computed.

    Values are kept as they are, except that float64 becomes float32. The files are read twice: once for their SHA-256,
    once for their rows. Committed chunks with correct checksums are reused, so an interrupted import resumes and a
    damaged chunk is repaired. Memory: one chunk, and some 90 bytes per sample while the samples are numbered.

    Args:
        vectors: result of `open_vectors`.
        cache: path of a new cache, or of the cache of an earlier import of the same files.
        settings: model, columns of the table, chunk size.
        progress: progress in files, then in items.
        options: settings by their names on the command line, which replace the values of `settings`.

    Returns:
        One report per feature.

    Example:
        >>> import embedcache, numpy
        >>> numpy.save("photos.npy", numpy.eye(100, 8, dtype=numpy.float16))
        >>> vectors = embedcache.open_vectors("npy", files={"image": "photos.npy"})
        >>> reports = embedcache.import_vectors(vectors, "imported", model="clip-vit-base-patch32")
        >>> embedcache.Cache("imported").feature("image").load().shape
        (100, 8)

    Raises:
        FingerprintError: the cache contains other files, or the same files with other bytes or options.
        SourceError: a table lacks a column, a table has more or fewer rows than its vectors, or no row has a vector.
        SettingError: text vectors without their captions, or a column of files of a modality that has no vectors.
        CorruptError: a file is damaged.
    """
    if not isinstance(vectors, VectorImport):
        raise SettingError(f"vectors: expected what open_vectors returns, got {vectors!r}; open them with open_vectors")

    progress = to_progress(progress)
    settings = merge_settings(ImportSettings, settings, options)
    columns = _check_tables(vectors, settings)
    hashes = _hash_files(vectors, progress)
    source = _describe(vectors, hashes, settings.model, columns)

    path = open_path(cache)
    if info_path(path).is_file():
        # The files may have moved since, so only their content is compared.
        stored = {**read_info(path).source, "path": source["path"]}
        check_same(f"cache {path}", stored, source, next_step=_NEXT_STEP)
    else:
        index(ImportedSamples(vectors, source, columns), path, chunk_size=settings.chunk_size, progress=progress)

    cache = Cache(path)
    remember(source, cache.info.index_digest)
    remove_partials(path)

    # The cache stores one digest of all files; the record of the stage has the SHA-256 of each.
    reports: list[FillReport] = []
    with record_stage(new_record_path(path, "import"), "import", {**source, "files": hashes}) as outcome:
        for name in vectors.modalities:
            reports.append(_import_feature(cache, vectors, name, source, progress))
        outcome["features"] = list(map(vars, reports))
    return reports


def _check_tables(vectors: VectorImport, settings: ImportSettings) -> SourceSettings:
    """Return the settings of tables.

    Raises:
        SettingError: a setting needs a table or vectors that are not given.
    """
    columns = SourceSettings(
        key_column=settings.key_column,
        caption_columns=settings.caption_columns,
        item_columns=settings.item_columns,
    )

    has_tables = any(group.table is not None for group in vectors.groups)
    if not has_tables and "text" in vectors.modalities.values():
        raise SettingError(f"{vectors.path}: text vectors need a table with their captions; name one with --table")

    if not has_tables and columns.to_json():
        option = next(iter(columns.to_json())).removesuffix("s")
        raise SettingError(f"{option}: expected vectors with a table, got none; name it, too")

    # An item column without vectors of its modality would name files that nothing refers to.
    for modality in columns.item_columns:
        if modality not in vectors.modalities.values():
            raise SettingError(f"item_column: expected a modality of the imported vectors, got {modality}; omit it")
    return columns


def _hash_files(vectors: VectorImport, progress: Progress) -> dict[str, str]:
    """Return the SHA-256 of each file by its path relative to the folder that the user named."""
    # Relative paths do not change when the whole folder moves.
    root = vectors.path if vectors.path.is_dir() else vectors.path.parent

    hashes = {}
    progress.start("hashing", len(vectors.files), "files")
    for path in vectors.files:
        hashes[os.path.relpath(path, root)] = digest_file(path)
        progress.advance(1)
    progress.finish()
    return hashes


def _describe(
    vectors: VectorImport, hashes: Mapping[str, str], model: str | None, columns: SourceSettings
) -> dict[str, Any]:
    """Return everything that determines the result of an import, as `cache.json` stores it."""
    return {
        "type": IMPORTED_SOURCE,
        "path": str(vectors.path.absolute()),
        "settings": {},
        "format": vectors.form,
        "columns": columns.to_json(),
        "features": dict(vectors.modalities),
        "files": digest(hashes),
        "model": model,
        **vectors.origin,
    }


def _import_feature(
    cache: Cache, vectors: VectorImport, name: str, source: Mapping[str, Any], progress: Progress
) -> FillReport:
    modality = vectors.modalities[name]
    file_dtype, cache_dtype = vectors.dtypes(name)
    if file_dtype != cache_dtype:
        progress.note(f"{name}: {file_dtype} is stored as {cache_dtype}")

    # The digest of the files stands for the weights of the model, which are not at hand.
    fingerprint = {
        "family": IMPORTED,
        "model": source["model"] or "unknown",
        "revision": None,
        "weights": source["files"],
        "preprocessing": {"format": vectors.form, "array": name},
        "pooling": {},
        "backend": None,
        "precision": None,
    }

    folder = EncoderSpec(IMPORTED, name).folder
    group = create_group(cache.path, modality, folder, cache.info, spec=f"{IMPORTED}:{folder}", fingerprint=fingerprint)
    producer = ImportedFeature(cache, vectors, name)
    add_feature(group, _FEATURE, *producer.outputs[_FEATURE][:2])

    # Damaged chunks count as missing, so `fill` imports them again.
    _withdraw_damaged(group)
    report = fill(group, producer, progress=progress)
    if sum(report.failures.values()) == vectors.num_rows:
        raise SourceError(f"{vectors.path}: expected usable vectors, got none in {vectors.num_rows:,} rows of {name}")
    return report


def _withdraw_damaged(group: EncoderGroup) -> None:
    """Withdraw the chunks that differ from their checksums, so that they are imported again."""
    for chunk in range(group.info.num_chunks(group.modality)):
        try:
            commit = group.commit(chunk)
            if commit is not None and group.has(commit, _FEATURE):
                Feature(group, _FEATURE).items(commit)
        except (CorruptError, UnfinishedError):
            withdraw(group, chunk, [_FEATURE])


class ImportedFeature:
    """Producer of one feature from its imported vectors."""

    verb: Verb = "imported"

    def __init__(self, cache: Cache, vectors: VectorImport, name: str) -> None:
        width = vectors.groups[0].vectors[name].width
        self.outputs = {_FEATURE: Output((width,), vectors.dtypes(name)[1])}
        self._cache = cache
        self._vectors = vectors
        self._name = name
        self._chunks: Iterator[Array] = iter(())
        self._next_row = vectors.num_rows

    def compute(self, rows: slice) -> ChunkFeatures:
        """Return the vectors of a chunk, without vectors that are not finite and vectors of blank captions."""
        vectors_BD = self._read(rows)
        values: list[Array | None] = list(vectors_BD)
        failures: list[str | None] = [None] * len(values)
        for position in np.flatnonzero(~np.isfinite(vectors_BD).all(axis=1)).tolist():
            failures[position] = _NO_VECTOR
            values[position] = None

        # A caption is recognized by its text, any other item only by its vector.
        if self._vectors.modalities[self._name] == "text":
            chunk = rows.start // self._cache.info.chunk_size
            captions = self._cache.items("text", chunk=chunk, columns=["text"])["text"].to_pylist()
            contents = list(map(str.encode, captions))
            for position, caption in enumerate(captions):
                if not caption.strip():
                    failures[position] = _EMPTY
                    values[position] = None
        else:
            contents = list(map(np.ndarray.tobytes, vectors_BD))

        return ChunkFeatures({_FEATURE: values}, list(map(hash_item, contents)), {_FEATURE: failures})

    def retries(self, _: Commit) -> bool:
        """Return False: the files are the same as before."""
        return False

    def _read(self, rows: slice) -> Array:
        """Read on to the rows of a chunk, from the beginning if they have been read before."""
        if rows.start < self._next_row:
            self._chunks = _rechunk(self._vectors.blocks(self._name), self._cache.info.chunk_size)
            self._next_row = 0

        # Chunks that are committed already are read and skipped.
        for vectors_BD in self._chunks:
            self._next_row += len(vectors_BD)
            if self._next_row == rows.stop:
                return vectors_BD
        raise CorruptError(f"{self._vectors.path}: expected {self._vectors.num_rows:,} rows, got fewer; {GET_AGAIN}")


def _rechunk(blocks: Iterator[Array], size: int) -> Iterator[Array]:
    """Iterate over a stream of arrays in arrays of `size` rows. The last may be shorter.

    Memory: two arrays of the input and two of the output.
    """
    waiting: list[Array] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= size:
            joined = np.concatenate(waiting)
            num_whole = len(joined) // size * size
            for start in range(0, num_whole, size):
                yield joined[start : start + size]

            # A copy, because a view would keep all of `joined` in memory.
            waiting = [joined[num_whole:].copy()]

    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


class ImportedSamples:
    """Source of the samples of imported vectors, one per row.

    A key is the cell of the key column, otherwise the row number over all groups. A sample has an item of each modality
    of the vectors, which is a file if a table names it. With text vectors it has one caption, which is empty if the
    cell is blank. Without text vectors it has all captions in the table.
    """

    def __init__(self, vectors: VectorImport, description: Mapping[str, Any], settings: SourceSettings) -> None:
        self._vectors = vectors
        self._description = description
        self._settings = settings
        self._modalities = set(vectors.modalities.values())
        self._file_modalities: list[str] = [name for name in vectors.modalities.values() if name != "text"]

    def describe(self) -> Mapping[str, Any]:
        """Return the description that the cache stores."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Iterate over all rows. Memory: one batch of a table.

        Raises:
            SourceError: a table lacks a column, or has more or fewer rows than its vectors.
        """
        first = 0
        for group in self._vectors.groups:
            yield from self._table_samples(group, first) if group.table else self._numbered_samples(group, first)
            first += group.num_rows

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item whose file a table names."""
        return ImportedSource(str(self._vectors.path), SourceSettings()).read(item)

    def _numbered_samples(self, group: FileGroup, first: int) -> Iterator[Sample]:
        # The items have vectors and no files.
        files = dict.fromkeys(self._file_modalities, (FileItem(path=""),))
        images = files.pop("image", ())
        for number in range(first, first + group.num_rows):
            yield Sample(key=_KEY_FORMAT.format(number), images=images, files=files)

    def _table_samples(self, group: FileGroup, first: int) -> Iterator[Sample]:
        assert group.table is not None
        file = open_table_file(group.table)
        columns = self._columns(file, group)

        count = 0
        for count, row in enumerate(file.rows(columns.to_read()), start=1):
            # Rows beyond the vectors are counted only, for the error.
            if count <= group.num_rows:
                yield self._sample(columns, row, first + count - 1, f"{group.table} row {count - 1:,}")

        if count != group.num_rows:
            vectors = next(iter(group.vectors.values())).path
            raise SourceError(
                f"{group.table}: expected {group.num_rows:,} rows as in {vectors}, got {count:,}; the two files do not "
                "belong together"
            )

    def _columns(self, file: TableFile, group: FileGroup) -> TableColumns:
        """Return the roles of the columns of a table. Files without vectors are columns like any other."""
        # Vectors in the table itself are not columns of its samples.
        vector_names: set[str] = set()
        for name, vectors in group.vectors.items():
            if vectors.path == group.table:
                vector_names.add(name)
        fields = [field for field in file.schema if field.name not in vector_names]
        file = replace(file, schema=pa.schema(fields))

        columns = assign_columns(file, self._settings)
        if "text" in self._modalities and not columns.captions:
            raise SourceError(
                f"{file.path}: text vectors need a column of captions; name one of {', '.join(file.columns)} with "
                "--caption-column"
            )

        items: dict[str, str] = {}
        interval: tuple[str | None, str | None] = (None, None)
        for modality, name in columns.items.items():
            if modality in self._modalities:
                items[modality] = name
                if MODALITIES[modality].has_interval:
                    interval = columns.interval

        # Columns that have no role here, such as files of a modality without vectors, become columns of the samples.
        plain_names = {*columns.others, *columns.items.values(), *columns.interval} - {*items.values(), *interval}
        columns_without_role = tuple(name for name in file.plain_columns if name in plain_names)
        return replace(columns, items=items, interval=interval, others=columns_without_role)

    def _sample(self, columns: TableColumns, row: Row, number: int, place: str) -> Sample:
        # An item without a file keeps an empty path, because its row has a vector.
        items = {}
        for modality in self._file_modalities:
            path = row.get(columns.items.get(modality, ""))
            items[modality] = [(path if isinstance(path, str) else "", 0)]

        sample = read_sample(columns, row, place, key=_KEY_FORMAT.format(number), items=items)
        if "text" not in self._modalities:
            return sample

        if len(sample.texts) > 1:
            raise SourceError(
                f"{place}: expected one caption per text vector, got {len(sample.texts)}; name the caption column "
                "with --caption-column"
            )

        # A blank caption keeps its row, so that rows of vectors and captions stay aligned.
        return sample if sample.texts else replace(sample, texts=(TextItem(text=""),))


class ImportedSource:
    """Source of the files that an import named, if they still exist. It has no samples to extract from."""

    items_are_files = True

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported(IMPORTED_SOURCE)
        self._location = Path(location)
        self._root = self._location if self._location.is_dir() else self._location.parent

    def describe(self) -> Mapping[str, Any]:
        """Return what is needed to open the source again."""
        return {"type": IMPORTED_SOURCE, "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Raise a `SourceError`, because an import has no files or texts that an encoder could encode."""
        raise SourceError(
            f"{self._location} was imported: it has vectors, and no files or texts to encode; extract from the "
            "original files and captions"
        )

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item.

        Raises:
            ItemError: the import named no file for it, or the file does not exist.
        """
        if not item.path:
            raise ItemError("the import named no file for this item")
        return read_item_file(resolve_item(self._root, item.path))
