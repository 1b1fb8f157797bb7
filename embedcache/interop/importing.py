"""Import of vectors that other tools computed: a normal cache, written chunk by chunk."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from embedcache.arrays import Array, Bools
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import CorruptError, SettingError, SourceError, UnfinishedError
from embedcache.files import AnyPath, open_path, remove_partials
from embedcache.interop.settings import ImportSettings
from embedcache.interop.vector_files import ImportedSamples, VectorImport, check_captions, stored_blocks
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import IMPORTED, check_same, digest, digest_file, new_record_path, record_stage
from embedcache.samples import IMPORTED_SOURCE
from embedcache.settings import merge_settings
from embedcache.sources.open import remember
from embedcache.sources.settings import SourceSettings
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit, hash_item
from embedcache.store.feature import EncoderGroup, Feature, create_group
from embedcache.store.indexing import index
from embedcache.store.layout import info_path, read_info
from embedcache.store.producer import FillReport, Output, Verb, fill
from embedcache.store.writer import ChunkFeatures, add_feature, withdraw

if TYPE_CHECKING:
    from embedcache.options import ImportOptions

_FEATURE = "vector"
_NO_VECTOR = "NaN or infinity in the imported vector"
_EMPTY = "empty caption"
UNIT_TOLERANCE = 1e-3
_CHECKED_ROWS = 1024
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

    Values are kept as they are, those of float64 as float32. The files are read twice: once for their SHA-256, once for
    their rows. Committed chunks with correct checksums are reused, so an interrupted import resumes and a damaged chunk
    is repaired. Memory: one chunk; while the samples are numbered, some 90 bytes of each.

    Returns:
        One report per feature.

    Raises:
        FingerprintError: the cache holds other files, or these with other bytes or options.
        SourceError: a table lacks a column, or has more or fewer rows than its vectors; or no row has a vector.
        SettingError: text vectors without their captions, or a column of files of a modality that has no vectors.
        CorruptError: a file is damaged.
    """
    if not isinstance(vectors, VectorImport):
        raise SettingError(f"vectors: expected what open_vectors returns, got {vectors!r}; open them with open_vectors")
    progress, settings = to_progress(progress), merge_settings(ImportSettings, settings, options)
    columns = _named_columns(vectors, settings)
    path = open_path(cache)
    check_captions(vectors)
    hashes = _hash_files(vectors, progress)
    source = _describe(vectors, hashes, settings.model, columns)
    if info_path(path).is_file():
        stored = {**read_info(path).source, "path": source["path"]}  # files may have moved
        check_same(f"cache {path}", stored, source, next_step=_NEXT_STEP)
    else:
        index(ImportedSamples(vectors, source, columns), path, chunk_size=settings.chunk_size, progress=progress)
    cache = Cache(path)
    remember(source, cache.info.index_digest)
    remove_partials(path)
    with record_stage(new_record_path(path, "import"), "import", {**source, "files": hashes}) as outcome:
        reports = [_import_feature(cache, vectors, name, source, progress) for name in vectors.modalities]
        outcome["features"] = [vars(report) for report in reports]
    return reports


def _named_columns(vectors: VectorImport, settings: ImportSettings) -> SourceSettings:
    """Return the settings of tables; SettingError if there is none, or no vector, that a named column belongs to."""
    columns = SourceSettings(
        key_column=settings.key_column,
        caption_columns=settings.caption_columns,
        item_columns=settings.item_columns,
    )
    for name, value in columns.to_json().items():
        if all(group.table is None for group in vectors.groups):
            option = name.removesuffix("s")
            raise SettingError(f"{option}: expected vectors with a table, got {value!r} and no table; name it, too")
    for modality, column in columns.item_columns.items():
        if modality not in vectors.modalities.values():
            raise SettingError(
                f"item_column: expected files whose vectors are imported, got {modality}={column} and no {modality} "
                "vectors; import them, too, or omit it"
            )
    return columns


def is_normalized(vectors_ND: Array) -> bool:
    """Return whether all finite rows have length 1, within the precision of float16."""
    finite_ND = np.asarray(vectors_ND, np.float32)[np.isfinite(vectors_ND).all(axis=1)]
    with np.errstate(over="ignore"):
        lengths_N = np.linalg.norm(finite_ND, axis=1)
    return bool((np.abs(lengths_N - 1) <= UNIT_TOLERANCE).all())


def _hash_files(vectors: VectorImport, progress: Progress) -> dict[str, str]:
    """Return the SHA-256 of each file by its path relative to what the user named."""
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
    modality, files = vectors.modalities[name], [group.vectors[name] for group in vectors.groups]
    first_blocks = (next(stored_blocks(file, 0, _CHECKED_ROWS), None) for file in files)
    in_file, in_cache = vectors.dtypes(name)
    if in_file != in_cache:
        progress.note(f"{name}: {in_file} is stored as {in_cache}")
    has_unit_length = all(is_normalized(block_BD) for block_BD in first_blocks if block_BD is not None)
    fingerprint = {
        "family": IMPORTED,
        "model": source["model"] or "unknown",
        "revision": None,
        "weights": source["files"],
        "preprocessing": {"format": vectors.form, "array": name, "is_normalized": has_unit_length},
        "pooling": {},
        "backend": None,
        "precision": None,
    }
    folder = EncoderSpec(IMPORTED, name).folder
    group = create_group(cache.path, modality, folder, cache.info, spec=f"{IMPORTED}:{folder}", fingerprint=fingerprint)
    producer = ImportedFeature(cache, vectors, name)
    add_feature(group, _FEATURE, *producer.outputs[_FEATURE][:2])
    _withdraw_damaged(group)
    report = fill(group, producer, progress=progress)
    if sum(report.failures.values()) == vectors.num_rows:
        raise SourceError(f"{vectors.path}: expected usable vectors, got none in {vectors.num_rows:,} rows of {name}")
    return replace(report, note="normalized" if has_unit_length else "not normalized")


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
    """The vectors of one feature: its producer."""

    verb: Verb = "imported"

    def __init__(self, cache: Cache, vectors: VectorImport, name: str) -> None:
        width = vectors.groups[0].vectors[name].width
        self.outputs = {_FEATURE: Output((width,), vectors.dtypes(name)[1])}
        self._cache = cache
        self._vectors = vectors
        self._name = name
        self._blocks: Iterator[Array] = iter(())
        self._next_row = vectors.num_rows

    def compute(self, rows: slice) -> ChunkFeatures:
        """Return the vectors of a chunk; a vector that is not finite, and that of a blank caption, is left out."""
        vectors_BD = self._read(rows)
        is_finite_B: Bools = np.asarray(np.isfinite(vectors_BD).all(axis=1))
        failures: list[str | None] = [None if is_finite else _NO_VECTOR for is_finite in is_finite_B]
        contents = [vector.tobytes() for vector in vectors_BD]

        if self._vectors.modalities[self._name] == "text":
            chunk = rows.start // self._cache.info.chunk_size
            texts = self._cache.items("text", chunk=chunk, columns=["text"])["text"].to_pylist()
            contents = [text.encode() for text in texts]
            failures = [failure if text.strip() else _EMPTY for text, failure in zip(texts, failures, strict=True)]

        values = [vector if reason is None else None for vector, reason in zip(vectors_BD, failures, strict=True)]
        return ChunkFeatures({_FEATURE: values}, list(map(hash_item, contents)), {_FEATURE: failures})

    def retries(self, _: Commit) -> bool:
        """Return False: the files are the same as before."""
        return False

    def _read(self, rows: slice) -> Array:
        """Read the rows of a chunk. Files are read on from the last one: opening at any row reads those before it."""
        if rows.start < self._next_row:
            self._blocks = self._vectors.blocks(self._name, rows.start, self._cache.info.chunk_size)
            self._next_row = rows.start
        while True:
            vectors_BD = next(self._blocks)
            self._next_row += len(vectors_BD)
            if self._next_row == rows.stop:
                return vectors_BD
