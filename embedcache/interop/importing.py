"""Vectors that others made into a normal cache: the numbering, then chunk by chunk."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import CorruptError, SourceError, UnfinishedError
from embedcache.files import open_path, remove_partials
from embedcache.interop.incoming import ImportedRows, Incoming
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, digest, digest_file, run_record
from embedcache.sources.base import IMPORTED
from embedcache.sources.settings import SourceSettings
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, add_feature, create_group, hash_item
from embedcache.store.indexing import index
from embedcache.store.layout import info_path, read_info
from embedcache.store.writer import commit_chunk, withdraw

FEATURE = "vector"
NO_VECTOR = "NaN or infinity in the imported vector"
EMPTY = "empty caption"
UNIT_TOLERANCE = 1e-3
_ROWS_LOOKED_AT = 1024
_SAME = "put the files back as they were and give the same options, or import into a new folder"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did for one feature.

    Args:
        modality: `image` or `text`.
        feature: `encoder/feature`, as the cache names it.
        taken: vectors in the chunks that were written now.
        reused: vectors in the chunks that were there.
        failures: reason -> number of rows without a vector, over the whole cache.
        is_normalized: whether the first rows of each file have length 1.
    """

    modality: str
    feature: str
    taken: int
    reused: int
    failures: Mapping[str, int]
    is_normalized: bool

    def line(self) -> str:
        """Say it in one line."""
        failed = "; ".join(f"{count:,} {reason}" for reason, count in self.failures.items())
        return (
            f"{self.feature}: imported {self.taken:,} {self.modality} vectors, reused {self.reused:,}, failed "
            f"{sum(self.failures.values()):,}{': ' + failed if failed else ''}; "
            f"{'of length 1' if self.is_normalized else 'not normalised'}"
        )


def import_vectors(
    incoming: Incoming,
    cache_path: Path | str,
    *,
    model: str | None = None,
    chunk_size: int | None = None,
    settings: SourceSettings | None = None,
    progress: Progress | None = None,
) -> list[Imported]:
    """Make a normal cache of vectors that others computed. Values are kept as they are, in their own dtype.

    The files are read twice: once for their SHA-256, once for their rows. Chunks that are committed and sound are not
    written again, so an import that was stopped goes on, and a damaged chunk is mended. Memory: a chunk; while samples
    are numbered, their keys.

    Args:
        incoming: the files.
        cache_path: a new folder, or a cache of the same import.
        model: what made the vectors, in words, for the record.
        chunk_size: vectors in a chunk; None is 2,048.
        settings: `key_column` and `caption_columns` of the tables.
        progress: told about files, samples and vectors.

    Returns:
        One report a feature.

    Raises:
        FingerprintError: the cache is of other files, or of these with other bytes or options.
        SourceError: a table lacks a column, or has more or fewer rows than its vectors; or no row has a vector.
        SettingError: vectors of texts without their captions.
        CorruptError: a file is damaged.
    """
    progress, settings = progress or NullProgress(), settings or SourceSettings()
    path = open_path(cache_path)
    hashes = _hash_files(incoming, progress)
    source = _describe(incoming, hashes, model, settings)
    if info_path(path).is_file():
        check_same(f"cache {path}", _comparable(read_info(path).source), _comparable(source), next_step=_SAME)
    else:
        index(ImportedRows(incoming, source, settings), path, chunk_size=chunk_size, progress=progress)
    cache = Cache(path)
    remove_partials(path)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    with run_record(path / "records" / f"import-{started}.json", "import", {**source, "files": hashes}) as outcome:
        reports = [_import_feature(cache, incoming, name, source, progress) for name in incoming.modalities]
        outcome["features"] = [vars(report) for report in reports]
    return reports


def is_normalized(vectors_ND: Array) -> bool:
    """Say whether all rows that hold numbers have length 1, as far as float16 can say."""
    lengths = np.linalg.norm(np.asarray(vectors_ND, np.float32), axis=1)
    return bool((np.abs(lengths[np.isfinite(lengths)] - 1) <= UNIT_TOLERANCE).all())


def _hash_files(incoming: Incoming, progress: Progress) -> dict[str, str]:
    """Get the SHA-256 of each file, by its path below what was named."""
    root = incoming.path if incoming.path.is_dir() else incoming.path.parent
    hashes = {}
    progress.start("hashing", len(incoming.files), "files")
    for path in incoming.files:
        hashes[os.path.relpath(path, root)] = digest_file(path)
        progress.advance(1)
    progress.finish()
    return hashes


def _describe(
    incoming: Incoming, hashes: Mapping[str, str], model: str | None, settings: SourceSettings
) -> dict[str, Any]:
    """Say all that decides what an import makes; `cache.json` keeps it."""
    return {
        "type": IMPORTED,
        "path": str(incoming.path.absolute()),
        "settings": {},
        "format": incoming.form,
        "columns": settings.to_json(),
        "features": dict(incoming.modalities),
        "files": digest(hashes),
        "model": model,
        **incoming.about,
    }


def _comparable(source: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where the files lie: they may have moved."""
    return {name: value for name, value in source.items() if name != "path"}


def _import_feature(
    cache: Cache, incoming: Incoming, name: str, source: Mapping[str, Any], progress: Progress
) -> Imported:
    modality, rows = incoming.modalities[name], incoming.like(name)
    firsts = (next(part.vectors[name].blocks(0, _ROWS_LOOKED_AT), None) for part in incoming.parts)
    has_length_1 = all(is_normalized(block) for block in firsts if block is not None)
    fingerprint = {
        "family": IMPORTED,
        "model": source["model"] or "unknown",
        "revision": None,
        "weights": source["files"],
        "preprocessing": {"format": incoming.form, "array": name, "is_normalized": has_length_1},
        "pooling": {},
        "backend": None,
        "precision": None,
    }
    folder = EncoderSpec(IMPORTED, name).folder
    group = create_group(cache.path, modality, folder, cache.info, spec=f"{IMPORTED}:{folder}", fingerprint=fingerprint)
    add_feature(group, FEATURE, (rows.width,), rows.dtype)
    taken = _commit_chunks(cache, group, incoming, name, progress)
    failures = _count_failures(cache, group)
    if failures.total() == incoming.num_rows:
        raise SourceError(f"none of {incoming.num_rows:,} rows of {name} in {incoming.path} has a usable vector")
    return Imported(
        modality=modality,
        feature=f"{group.name}/{FEATURE}",
        taken=taken,
        reused=incoming.num_rows - taken,
        failures=dict(failures.most_common()),
        is_normalized=has_length_1,
    )


def _count_failures(cache: Cache, group: EncoderGroup) -> Counter[str]:
    """Count over the commits, one at a time."""
    failures: Counter[str] = Counter()
    for chunk in range(cache.info.num_chunks(group.modality)):
        commit = group.commit(chunk)
        if commit is not None:
            failures.update(reason for reason in commit.failures[FEATURE] if reason is not None)
    return failures


def _commit_chunks(cache: Cache, group: EncoderGroup, incoming: Incoming, name: str, progress: Progress) -> int:
    """Write the chunks that are not there or not sound; give how many vectors those hold."""
    missing = {chunk for chunk in range(cache.info.num_chunks(group.modality)) if not _is_sound(group, chunk)}
    if not missing:
        return 0
    first, size, taken = min(missing), cache.info.chunk_size, 0
    progress.start(f"importing {name}", incoming.num_rows - first * size, "vectors")
    for chunk, vectors in enumerate(incoming.blocks(name, first * size, size), start=first):
        if chunk in missing:
            _commit(cache, group, chunk, vectors)
            taken += len(vectors)
        progress.advance(len(vectors))
    progress.finish()
    return taken


def _is_sound(group: EncoderGroup, chunk: int) -> bool:
    """Say whether a chunk is committed and its bytes are those that were; else make it not exist."""
    try:
        commit = group.commit(chunk)
        if commit is None or not group.has(commit, FEATURE):
            return False
        for _ in Feature(group, FEATURE).read_chunk(commit):
            pass
    except (CorruptError, UnfinishedError):
        withdraw(group, chunk, [FEATURE])
        return False
    return True


def _commit(cache: Cache, group: EncoderGroup, chunk: int, vectors: Array) -> None:
    texts = cache.items("text", chunk=chunk)["text"].to_pylist() if group.modality == "text" else [None] * len(vectors)
    failures = list(_failures(vectors, texts))
    items = [vector if reason is None else None for vector, reason in zip(vectors, failures, strict=True)]
    said = (vector.tobytes() if text is None else text.encode() for vector, text in zip(vectors, texts, strict=True))
    hashes = [hash_item(data) for data in said]
    commit_chunk(group, chunk, {FEATURE: items}, hashes, {FEATURE: failures})


def _failures(vectors: Array, texts: Sequence[str | None]) -> Iterator[str | None]:
    is_finite_N: Bools = np.asarray(np.isfinite(vectors).all(axis=1))
    for is_finite, text in zip(is_finite_N, texts, strict=True):
        if text is not None and not text.strip():
            yield EMPTY
        else:
            yield None if is_finite else NO_VECTOR
