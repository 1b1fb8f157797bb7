"""Import of vectors that other tools computed: a normal cache, written chunk by chunk."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools
from embedcache.encoders.open import IMPORTED, EncoderSpec
from embedcache.errors import CorruptError, SettingError, SourceError, UnfinishedError, pluralize
from embedcache.files import AnyPath, open_path, remove_partials
from embedcache.interop.settings import ImportSettings
from embedcache.interop.vector_files import ImportedSamples, VectorImport, check_captions, stored_blocks
from embedcache.locks import Leases
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_same, digest, digest_file
from embedcache.records import new_record_path, record_stage
from embedcache.settings import merge_settings
from embedcache.sources.open import IMPORTED_SOURCE
from embedcache.sources.reopen import remember
from embedcache.sources.settings import SourceSettings
from embedcache.store.cache import Cache
from embedcache.store.columns import to_array
from embedcache.store.commits import describe_failures, hash_item
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, create_group
from embedcache.store.indexing import index
from embedcache.store.layout import info_path, read_info
from embedcache.store.writer import add_feature, commit_chunk, withdraw

_FEATURE = "vector"
_NO_VECTOR = "NaN or infinity in the imported vector"
_EMPTY = "empty caption"
UNIT_TOLERANCE = 1e-3
_CHECKED_ROWS = 1024
_NEXT_STEP = "restore the files and use the same options, or import into a new folder"


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Outcome of an import for one feature.

    Args:
        modality: modality of the vectors.
        feature: `encoder/feature` in the cache.
        imported: vectors in the chunks that were written now.
        reused: vectors in the chunks that existed before.
        failures: reason -> number of rows without a vector, over the whole cache.
        is_normalized: whether the first rows of each file have length 1.
    """

    modality: str
    feature: str
    imported: int
    reused: int
    failures: Mapping[str, int]
    is_normalized: bool

    def line(self) -> str:
        """Return the outcome in one line."""
        return (
            f"{self.feature}: imported {pluralize(self.imported, f'{self.modality} vector')}, reused {self.reused:,}, "
            f"{describe_failures(self.failures)}; "
            f"{'normalized' if self.is_normalized else 'not normalized'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as it is recorded on disk."""
        return {
            "modality": self.modality,
            "feature": self.feature,
            "taken": self.imported,
            "reused": self.reused,
            "failures": self.failures,
            "is_normalized": self.is_normalized,
        }


def import_vectors(
    vectors: VectorImport,
    cache: AnyPath,
    settings: ImportSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> list[ImportReport]:
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
        outcome["features"] = [report.to_json() for report in reports]
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
) -> ImportReport:
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
    add_feature(group, _FEATURE, (files[0].width,), in_cache)
    num_imported = _write_chunks(cache, group, vectors, name, progress)
    group.compact()
    failures: Counter[str] = Counter()
    for commit in filter(None, map(group.commit, range(cache.info.num_chunks(modality)))):
        failures.update(to_array(commit.failures[_FEATURE], pa.string()).drop_null().to_pylist())
    if failures.total() == vectors.num_rows:
        raise SourceError(f"{vectors.path}: expected usable vectors, got none in {vectors.num_rows:,} rows of {name}")
    return ImportReport(
        modality=modality,
        feature=f"{group.name}/{_FEATURE}",
        imported=num_imported,
        reused=vectors.num_rows - num_imported,
        failures=dict(failures.most_common()),
        is_normalized=has_unit_length,
    )


def _write_chunks(cache: Cache, group: EncoderGroup, vectors: VectorImport, name: str, progress: Progress) -> int:
    """Write the chunks that are missing or damaged; return the number of vectors in them."""
    missing = {chunk for chunk in range(cache.info.num_chunks(group.modality)) if not _is_intact(group, chunk)}
    if not missing:
        return 0
    leases = Leases(group.path / "chunks")  # while it exists, no other process deletes the folder
    leases.take_part()
    first, size, num_imported = min(missing), cache.info.chunk_size, 0
    progress.start(f"importing {name}", vectors.num_rows - first * size, "vectors")
    for chunk, vectors_BD in enumerate(vectors.blocks(name, first * size, size), start=first):
        if chunk in missing:
            _write_chunk(cache, group, chunk, vectors_BD)
            num_imported += len(vectors_BD)
        progress.advance(len(vectors_BD))
    progress.finish()
    return num_imported


def _is_intact(group: EncoderGroup, chunk: int) -> bool:
    """Return whether a chunk is committed with correct checksums; withdraw the commit of a damaged one."""
    try:
        commit = group.commit(chunk)
        if commit is None or not group.has(commit, _FEATURE):
            return False
        for _ in Feature(group, _FEATURE).read_chunk(commit):
            pass
    except (CorruptError, UnfinishedError):
        withdraw(group, chunk, [_FEATURE])
        return False
    return True


def _write_chunk(cache: Cache, group: EncoderGroup, chunk: int, vectors_BD: Array) -> None:
    texts: list[str | None] = [None] * len(vectors_BD)
    if group.modality == "text":
        texts = cache.items("text", chunk=chunk, columns=["text"])["text"].to_pylist()
    is_finite_B: Bools = np.asarray(np.isfinite(vectors_BD).all(axis=1))
    failures = [_failure(*row) for row in zip(texts, is_finite_B, strict=True)]
    values = [vector if reason is None else None for vector, reason in zip(vectors_BD, failures, strict=True)]
    contents = (
        vector.tobytes() if text is None else text.encode() for vector, text in zip(vectors_BD, texts, strict=True)
    )
    commit_chunk(group, chunk, {_FEATURE: values}, list(map(hash_item, contents)), {_FEATURE: failures})


def _failure(text: str | None, is_finite: bool) -> str | None:  # noqa: FBT001
    """Return why an item has no vector, None if it has one; `text` is that of a caption."""
    if text is not None and not text.strip():
        return _EMPTY
    return None if is_finite else _NO_VECTOR
