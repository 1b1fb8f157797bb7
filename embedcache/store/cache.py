"""An open cache: its tables, its features by name, and a description of its content."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import CorruptError, UnknownNameError
from embedcache.files import open_path
from embedcache.modalities import MODALITIES, noun
from embedcache.registry import unknown_name
from embedcache.sources.files import wrap_io_errors
from embedcache.store.checksums import BLOCK, check_rows, find_changed
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, open_group
from embedcache.store.layout import CacheInfo, items_path, read_info, samples_path
from embedcache.store.tables import open_table, read_table, table_errors


class Cache:
    """The samples and features of one dataset, read-only.

    Args:
        path: folder of the cache.

    Raises:
        PathError: the folder is not a cache.
        ArtifactError: the cache has a later format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = open_path(path)
        with wrap_io_errors(self.path):
            self.info: CacheInfo = read_info(self.path)
        # Parsing a footer takes longer than reading the rows of a chunk.
        self._sample_columns: dict[str, pa.ChunkedArray] = {}
        self._footers: dict[tuple[str, int, float], pq.FileMetaData] = {}

    @cached_property
    def columns(self) -> list[str]:
        """Column names of the sample table, without reading it."""
        path = samples_path(self.path)
        with table_errors(path), open_table(path) as table:
            names = list(table.schema_arrow.names)
        self._require_columns("samples", names, None)
        return names

    @cached_property
    def samples(self) -> pa.Table:
        """The sample table: one row per sample in row order, `key` and the columns of the source.

        Rows beyond those that `cache.json` counts are omitted: a process killed while it appended samples leaves them.

        Raises:
            CorruptError: the table cannot be read, or differs from its checksums.
        """
        with table_errors(samples_path(self.path)):
            rows = read_table(samples_path(self.path)).slice(0, self.info.num_samples)
        self._require_columns("samples", rows.column_names, None)
        return self._checked("samples", rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of the sample table, which is read once, without the others.

        Raises:
            KeyError: there is no such column; `columns` lists them.
            CorruptError: the table cannot be read, or the rows differ from their checksums.
        """
        if name not in self._sample_columns:
            with table_errors(samples_path(self.path)):
                rows = read_table(samples_path(self.path), [name]).slice(0, self.info.num_samples)
            self._require_columns("samples", rows.column_names, [name])
            self._sample_columns[name] = self._checked("samples", rows)[name]
        return self._sample_columns[name]

    def items(self, modality: str, *, chunk: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the item table of a modality: one row per item, in row order.

        Args:
            modality: `text` (sample, text, language), or one of files (sample, path, offset, length; of audio and video
                also start_s and stop_s).
            chunk: return only the rows of this chunk; None returns all.
            columns: names of the columns to read; None reads all.

        Raises:
            CorruptError: the table cannot be read, or the rows differ from their checksums.
        """
        path = items_path(self.path, modality)
        with table_errors(path):
            if chunk is None:
                rows = read_table(path, columns=columns).slice(0, self.info.num_items.get(modality, 0))
                self._require_columns(modality, rows.column_names, columns)
                return self._checked(modality, rows)
            status = path.stat()
            stamp = (modality, status.st_size, status.st_mtime)  # another process may append samples at any time
            with open_table(path, self._footers.get(stamp)) as file:
                self._footers = {stamp: file.metadata}
                rows = file.read_row_group(chunk, columns=columns, use_threads=False)
            rows = rows.slice(0, self.info.count_items(modality, [chunk]))
            self._require_columns(modality, rows.column_names, columns)
            return self._checked(modality, rows, chunk)

    def _require_columns(self, name: str, found: Sequence[str], requested: Sequence[str] | None) -> None:
        """Check that a table has the requested columns, or all that were written; Arrow omits unknown ones silently."""
        written = self.info.table_checksums.get(name, {})
        missing = [column for column in requested or written if column in written and column not in found]
        if missing:
            raise CorruptError(
                f"the table of {name} in {self.path} has no column {missing[0]!r}; restore the file, or extract into a "
                "new folder"
            )

    def _checked(self, name: str, rows: pa.Table, chunk: int | None = None) -> pa.Table:
        """Return rows of a table, all or those of a chunk, that equal their checksums.

        Another process may have moved failed items by `--retry-failed` since this cache was opened.
        """
        is_samples = name == "samples"
        path = samples_path(self.path) if is_samples else items_path(self.path, name)
        block_rows = BLOCK if is_samples else self.info.chunk_size
        place = slice(0, self.info.num_samples if is_samples else self.info.num_items.get(name, 0))
        if chunk is not None:
            place = self.info.chunk_rows(name, chunk)
        if len(rows) != place.stop - place.start:
            raise CorruptError(
                f"{path}: expected {place.stop - place.start:,} rows, got {len(rows):,}; restore the file, or extract "
                "into a new folder"
            )
        if find_changed(rows, self.info.table_checksums.get(name, {}), place.start, block_rows) is not None:
            check_rows(rows, read_info(self.path).table_checksums.get(name, {}), place.start, block_rows, path)
        return rows

    def encoders(self, modality: str) -> list[EncoderGroup]:
        """Return the encoders with features of a modality, sorted by name."""
        paths = sorted((self.path / modality).glob("*/zarr.json"))
        return [open_group(self.path, modality, path.parent.name, self.info) for path in paths]

    def features(self, modality: str) -> list[Feature]:
        """Return all features of a modality, complete or not, sorted by name."""
        return [Feature(group, name) for group in self.encoders(modality) for name in group.features]

    def feature(self, modality: str, name: str | None = None) -> Feature:
        """Return a feature by name.

        Args:
            modality: name of a modality.
            name: `encoder/feature`; `encoder` if it has one feature; None if the modality has one feature.

        Raises:
            UnknownNameError: no feature or several features have that name; the message lists them.
        """
        features = self.features(modality)
        kind = f"{modality} feature of {self.path}"
        matches = [feature for feature in features if name in (None, feature.name, feature.group.name)]
        if len(matches) == 1:
            return matches[0]
        names = [feature.name for feature in features]
        if not features:
            raise UnknownNameError(self._missing(modality))
        if not matches:
            raise unknown_name(kind, name or "", names)
        raise UnknownNameError(
            f"{kind}: {'no name was given' if name is None else repr(name) + ' matches several'}; "
            f"name one of these features: {', '.join(feature.name for feature in matches)}"
        )

    def _missing(self, modality: str) -> str:
        """Return the message that the cache has no features of a modality, and what it has instead."""
        if modality not in MODALITIES:
            return f"unknown modality {modality!r}; known: {', '.join(MODALITIES)}"
        option = f"--{modality}-encoder SPEC" if modality in ("image", "text") else f"--encoder {modality}=SPEC"
        message = f"{self.path} has no {modality} features; extract some: embedcache extract {option}"
        others = [(other, feature) for other in MODALITIES for feature in self.features(other)]
        if all(other in ("image", "text") for other, _ in others):
            return message
        known = ", ".join(f"{other}={feature.name}" for other, feature in others)
        return f"{message}; or name others with --feature MODALITY=NAME, one of: {known}"


def describe_cache(cache: Cache) -> str:
    """Return one line with the number of samples and items, the source and the chunk size."""
    items = ", ".join(f"{count:,} {noun(modality)}" for modality, count in cache.info.num_items.items())
    source = f"{cache.info.source.get('type')} {cache.info.source.get('path', '')}".strip()
    return (
        f"{cache.path}: {cache.info.num_samples:,} samples with {items}, from {source}; "
        f"chunks of {cache.info.chunk_size:,}, format {cache.info.format}"
    )


def caption_error_lines(cache: Cache, *, num_shown: int = 5) -> list[str]:
    """Return lines about the samples whose captions cannot be read; empty if there are none."""
    if "caption_error" not in cache.columns:
        return []
    unreadable = cache.samples.select(["key", "caption_error"])
    unreadable = unreadable.filter(unreadable["caption_error"].is_valid())
    if not len(unreadable):
        return []
    lines = [f"{len(unreadable):,} samples have captions that cannot be read; they count as samples without captions"]
    lines += [f"  key {row['key']}: {row['caption_error']}" for row in unreadable.slice(0, num_shown).to_pylist()]
    return [*lines, f"  … and {len(unreadable) - num_shown:,} more"] if len(unreadable) > num_shown else lines


def describe_feature(feature: Feature) -> list[str]:
    """Return the name, modality, shape, dtype, committed chunks, failed items and bytes on disk of a feature."""
    committed = [commit for commit in feature.commits if commit is not None]
    files = [path for path in (feature.group.path / feature.feature).rglob("*") if path.is_file()]
    shape = " × ".join("any" if size < 0 else f"{size:,}" for size in feature.shape)
    return [
        feature.name,
        feature.modality,
        shape,
        feature.dtype,
        f"{len(committed)}/{len(feature.commits)}",
        f"{len(feature.failures):,}",
        f"{sum(path.stat().st_size for path in files):,}",
    ]


def failure_lines(cache: Cache, feature: Feature, *, num_shown: int = 5) -> list[str]:
    """Return lines about failed items: for each kind of reason, most frequent first, some of the items.

    Reads the rows of one chunk of the item table per item shown.
    """
    rows: dict[str, list[int]] = {}
    for row, reason in feature.failures.items():
        rows.setdefault(reason.partition(":")[0], []).append(row)
    lines = []
    for kind, members in sorted(rows.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(members):,} failed: {kind}")
        lines += [f"    {_describe_item(cache, feature, row)}: {feature.failures[row]}" for row in members[:num_shown]]
        if len(members) > num_shown:
            lines.append(f"    … and {len(members) - num_shown:,} more")
    return lines


def _describe_item(cache: Cache, feature: Feature, row: int) -> str:
    chunk, offset = divmod(row, cache.info.chunk_size)
    item = cache.items(feature.modality, chunk=chunk).slice(offset, 1).to_pylist()[0]
    key = cache.column("key")[item["sample"]].as_py()
    return f"row {row}, key {key}" + (f", {item['path']}" if "path" in item else "") + _describe_interval(item)


def _describe_interval(item: Mapping[str, Any]) -> str:
    bounds = [item.get("start_s"), item.get("stop_s")]
    if bounds == [None, None]:
        return ""
    start, stop = (
        word if bound is None else f"{bound:g} s" for bound, word in zip(bounds, ("start", "end"), strict=True)
    )
    return f", {start} to {stop}"
