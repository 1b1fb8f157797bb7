"""Numbering: writes every sample and item of a source down, in row order, before a model runs."""

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.artifact import canonical_json, check_same
from embedcache.cache.layout import (
    DEFAULT_CHUNK_SIZE,
    CacheInfo,
    info_path,
    items_path,
    read_info,
    samples_path,
    write_info,
)
from embedcache.disk import disk_errors, flush, locked, make_folder, partial_path
from embedcache.errors import FingerprintError, PathError, SettingError, SourceError
from embedcache.progress import Progress, Silent
from embedcache.sources.contract import Sample, Source

_IMAGE_SCHEMA = pa.schema(
    [("sample", pa.int64()), ("path", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]
)
_TEXT_SCHEMA = pa.schema([("sample", pa.int64()), ("text", pa.string()), ("language", pa.string())])
_SCHEMAS = {"image": _IMAGE_SCHEMA, "text": _TEXT_SCHEMA}
_BATCH = 65_536
_OURS = {".lock", "cache.json", "samples.parquet", *_SCHEMAS}


def index(
    source: Source,
    cache_path: Path,
    *,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> CacheInfo:
    """Number a source into a new cache, or check that a cache still numbers this source.

    Memory: one Arrow row a sample, about 100 bytes each, while the cache is made; a batch while it is checked.

    Args:
        source: where the samples come from.
        cache_path: a folder that is new, empty, or a cache of this source; a cache without features is made anew.
        chunk_size: items in a chunk; None is the cache's own, or 2,048 for a new one.
        progress: told the number of samples.

    Raises:
        PathError: the folder holds something else, or a file is in the way.
        FingerprintError: the cache numbers another source, or the source changed since, or the chunk size differs.
        SettingError: a chunk of no item.
        SourceError: no sample, a key that stands twice, or columns of mixed types.
    """
    progress = progress or Silent()
    if chunk_size is not None and chunk_size < 1:
        raise SettingError(f"chunk size is {chunk_size}; it must be at least 1")
    if not info_path(cache_path).is_file():
        make_folder(cache_path)
        _refuse_foreign(cache_path)
        with locked(cache_path), disk_errors(cache_path):
            if not info_path(cache_path).is_file():  # another process may have made it meanwhile
                return _create(source, cache_path, chunk_size or DEFAULT_CHUNK_SIZE, progress)
    try:
        return _check(source, cache_path, chunk_size, progress)
    except FingerprintError:
        if any(cache_path.glob("*/*/chunks/*.parquet")):
            raise
    with locked(cache_path), disk_errors(cache_path):  # nothing was extracted: a first try with a mistake in it
        for group in cache_path.glob("*/*/zarr.json"):
            shutil.rmtree(group.parent)
        return _create(source, cache_path, chunk_size or DEFAULT_CHUNK_SIZE, progress)


def _create(source: Source, cache_path: Path, chunk_size: int, progress: Progress) -> CacheInfo:
    folder = partial_path(cache_path / "indexing")
    try:
        info = _write_tables(source, folder, chunk_size, progress)
        _move_into_place(folder, cache_path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_info(cache_path, info)
    return info


def _refuse_foreign(cache_path: Path) -> None:
    names = (entry.name for entry in cache_path.iterdir())
    foreign = sorted(name for name in names if name not in _OURS and not name.endswith(".partial"))
    if foreign:
        raise PathError(
            f"{cache_path} is not a cache and not empty: it holds {', '.join(foreign[:3])}; "
            "give the path of a new folder"
        )


def _check(source: Source, cache_path: Path, chunk_size: int | None, progress: Progress) -> CacheInfo:
    info = read_info(cache_path)
    if chunk_size is not None:
        check_same(
            f"cache {cache_path}",
            {"chunk_size": info.chunk_size},
            {"chunk_size": chunk_size},
            next_step="leave --chunk-size out, or extract into a new folder",
        )
    spine = hashlib.sha256()
    progress.start("checking samples", info.num_samples, "samples")
    for batch in _batches(source.samples()):
        spine.update(_digest_input(batch))
        progress.advance(len(batch))
    progress.finish()
    if spine.hexdigest() != info.spine:
        raise FingerprintError(
            f"cache {cache_path} numbers other samples than this source has now: it was made from "
            f"{info.source.get('type')} {info.source.get('path', '')}, or that source changed since; "
            "extract into a new folder"
        )
    return info


def _write_tables(source: Source, folder: Path, chunk_size: int, progress: Progress) -> CacheInfo:
    folder.mkdir(parents=True)
    spine = hashlib.sha256()
    num_items = dict.fromkeys(_SCHEMAS, 0)
    tables: list[pa.Table] = []
    num_samples = 0
    writers = {name: _ItemWriter(items_path(folder, name), schema, chunk_size) for name, schema in _SCHEMAS.items()}
    progress.start("indexing", 0, "samples")
    for batch in _batches(source.samples()):
        spine.update(_digest_input(batch))
        tables.append(_sample_table(batch))
        for modality, writer in writers.items():
            num_items[modality] += writer.write(_item_rows(batch, num_samples, modality))
        num_samples += len(batch)
        progress.advance(len(batch))
    for writer in writers.values():
        writer.close()
    progress.finish()
    _write_samples(tables, folder, source)
    return CacheInfo(
        chunk_size=chunk_size,
        source=dict(source.describe()),
        spine=spine.hexdigest(),
        num_samples=num_samples,
        num_items={name: count for name, count in num_items.items() if count},
    )


def _batches(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, _BATCH)):
        yield batch


def _digest_input(batch: Sequence[Sample]) -> bytes:
    return b"".join(_line(sample) for sample in batch)


def _line(sample: Sample) -> bytes:
    try:
        return canonical_json(_identity(sample)) + b"\n"
    except UnicodeEncodeError as error:
        raise SourceError(
            f"sample {sample.key!r} holds text that is not Unicode: {error.reason}; mend the source"
        ) from error


def _identity(sample: Sample) -> list[Any]:
    images = [[item.path, item.offset, item.length] for item in sample.images]
    texts = [[item.text, item.language] for item in sample.texts]
    return [sample.key, images, texts, dict(sample.columns)]


def _sample_table(batch: Sequence[Sample]) -> pa.Table:
    columns: dict[str, list[Any]] = defaultdict(lambda: [None] * len(batch))
    for row, sample in enumerate(batch):
        for name, value in sample.columns.items():
            columns[name][row] = value
    arrays = {name: _column(values) for name, values in sorted(columns.items()) if name != "key"}
    return pa.table({"key": pa.array([sample.key for sample in batch], pa.string()), **arrays})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # mixed types: keep what people would read
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _item_rows(batch: Sequence[Sample], first: int, modality: str) -> list[dict[str, Any]]:
    if modality == "image":
        return [
            {"sample": row, "path": item.path, "offset": item.offset, "length": item.length}
            for row, sample in enumerate(batch, first)
            for item in sample.images
        ]
    return [
        {"sample": row, "text": item.text, "language": item.language}
        for row, sample in enumerate(batch, first)
        for item in sample.texts
    ]


class _ItemWriter:
    """Writes one row group a chunk, so that a worker reads just the rows of its chunk."""

    def __init__(self, path: Path, schema: pa.Schema, chunk_size: int) -> None:
        path.parent.mkdir(parents=True)
        self._writer = pq.ParquetWriter(path, schema)
        self._schema = schema
        self._chunk_size = chunk_size
        self._waiting: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> int:
        self._waiting += rows
        whole = len(self._waiting) // self._chunk_size * self._chunk_size
        self._write_groups(self._waiting[:whole])
        self._waiting = self._waiting[whole:]
        return len(rows)

    def close(self) -> None:
        self._write_groups(self._waiting)
        self._writer.close()

    def _write_groups(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            table = pa.Table.from_pylist(rows, schema=self._schema)
            self._writer.write_table(table, row_group_size=self._chunk_size)


def _write_samples(tables: list[pa.Table], folder: Path, source: Source) -> None:
    if not tables:
        raise SourceError(
            f"no sample found in {source.describe().get('path', 'the source')}; "
            "give a source that holds images or captions"
        )
    try:
        samples = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SourceError(f"a column of the source changes its type on the way: {error}") from error
    _refuse_duplicates(samples["key"])
    pq.write_table(samples, samples_path(folder), row_group_size=_BATCH)


def _refuse_duplicates(keys: pa.ChunkedArray) -> None:
    counts = pc.value_counts(keys)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        key = repeated[0]["values"].as_py()
        rows = pc.indices_nonzero(pc.equal(keys, key)).to_pylist()
        raise SourceError(
            f"keys must be unique; {key!r} is the key of rows {rows[0]} and {rows[1]} ({len(repeated)} such keys); "
            "rename a file (a.jpg and a.png have one key), or name another --key-column"
        )


def _move_into_place(folder: Path, cache_path: Path) -> None:
    moves = {samples_path(folder): samples_path(cache_path)}
    moves |= {items_path(folder, modality): items_path(cache_path, modality) for modality in _SCHEMAS}
    for made, place in moves.items():
        flush(made)
        make_folder(place.parent)
        made.replace(place)
        flush(place.parent)
