"""New caches from the samples of others: a subset of one, or several caches of the same encoders as one.

Tables are copied first; chunks are then read and committed one by one, so that the same call finishes one that was
killed. Nothing is encoded.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, blocks, concatenated_ranges
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SourceError, UnfinishedError, pluralize, summary
from embedcache.files import AnyPath, one_or_many, open_path, remove_partials, write_atomic
from embedcache.modalities import MODALITIES
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_same, digest, new_record_path, record_stage
from embedcache.registry import unknown_name
from embedcache.settings import replace_fields
from embedcache.sources.open import is_remembered, merged_description, merged_path, remember
from embedcache.store.cache import Cache, RowReader
from embedcache.store.commits import Commit
from embedcache.store.feature import EncoderGroup, Feature, create_group, read_feature
from embedcache.store.indexing import index_tables
from embedcache.store.layout import SAMPLES, SUBSET, Part, checked_fit_path, fit_path
from embedcache.store.producer import FillReport, Output, Verb, fill
from embedcache.store.tables import BLOCK, ITEM_SCHEMAS, SampleTables, Table, TableWriter
from embedcache.store.writer import ChunkFeatures


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """Result of a copy.

    Args:
        features: `modality/encoder/feature` that the new cache has.
        left_out: features that were not copied, because not all caches have them.
        copied: items in the chunks that were written now, over all features.
        reused: items in the chunks that existed before.
    """

    cache: Path
    num_samples: int
    features: Sequence[str]
    left_out: Sequence[str]
    copied: int
    reused: int

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the result as lines."""
        features = ", ".join(self.features) or "no features"
        lines = [
            f"{self.cache}: {pluralize(self.num_samples, 'sample')}, {features}; copied "
            f"{pluralize(self.copied, 'item')}, reused {self.reused:,}"
        ]
        for name in self.left_out:
            lines.append(f"left out, because not all of the caches have it: {name}")
        return lines


class _Origin(NamedTuple):
    """A cache, the rows of the samples to copy, ascending, and prefixes of their keys and paths."""

    cache: Cache
    samples: Ints
    key_prefix: str = ""
    path_prefix: str = ""


def cut_cache(
    cache: AnyPath,
    selection: Path | str,
    out: AnyPath,
    *,
    features: str | Sequence[str] = (),
    progress: AnyProgress = None,
) -> CopyReport:
    """Write the samples of a selection, with their features, into a separate cache.

    Features of other encoders are extracted with the new cache as the source. Memory: some 120 bytes per sample, and a
    chunk of each feature.

    Args:
        cache: path or URL of the cache.
        selection: Parquet file with a column `key`, or text file with one key per line.
        out: new folder, or one in which the same call was interrupted.
        features: features to copy, as `encoder/feature` or `encoder` (all if empty).
        progress: shows the number of items.

    Raises:
        DataError: a key of the selection is not in the cache, or the selection is empty.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the folder contains another cache.

    Example:
        >>> report = embedcache.cut_cache("cache", "selection.txt", "part-of-the-cache")
        >>> report.num_samples == len(embedcache.Cache("part-of-the-cache"))
        True
    """
    cache = Cache(open_path(cache))
    samples = np.setdiff1d(read_selection(selection, [cache]), cache.removed, assume_unique=True)
    if not len(samples):
        raise DataError(f"selection {selection}: expected samples of {cache.path}, got only removed ones")

    # The digest of the rows tells an interrupted cut from a cut of another selection.
    rows_digest = hashlib.sha256(np.ascontiguousarray(samples, "<i8").data).hexdigest()
    subset = {"of": cache.info.index_digest, "rows": rows_digest}
    description = {**cache.info.source, SUBSET: subset}
    return _copy([_Origin(cache, samples)], description, open_path(out), features, "cut", to_progress(progress))


def merge_caches(
    caches: Sequence[AnyPath],
    out: AnyPath,
    *,
    prefix_keys: bool = False,
    features: str | Sequence[str] = (),
    progress: AnyProgress = None,
) -> CopyReport:
    """Write the samples of several caches, with the features that all of them have, into one.

    Memory: some 120 bytes per sample, and a chunk of each feature.

    Args:
        caches: caches of the same encoders, in the order of the new rows.
        out: new folder, or one in which the same call was interrupted.
        prefix_keys: begin each key with the name of the folder of its cache and a slash.
        features: features to copy, as `encoder/feature` or `encoder` (if empty, all that every cache has).
        progress: shows the number of items.

    Raises:
        DataError: two caches have a sample of the same key, one of them is named twice, or all samples were removed.
        FingerprintError: features of one name have different fingerprints; names each field that differs.
        UnfinishedError: a feature has missing chunks.

    Example:
        >>> report = embedcache.merge_caches(["cache", "second-cache"], "merged", prefix_keys=True)
        >>> embedcache.Cache("merged").key(0)
        'cache/00000'
    """
    opened = [Cache(open_path(path)) for path in one_or_many(caches)]
    if len(opened) < 2:
        raise DataError(f"expected at least two caches to merge, got {len(opened)}")

    origins = []
    sources = []
    subset: dict[str, Any] = {"of": []}
    if prefix_keys:
        subset["prefixes"] = []
    for number, cache in enumerate(opened):
        # Caches may themselves be cut or merged; the new subset is of their rows as they are.
        source = dict(cache.info.source)
        source.pop(SUBSET, None)
        sources.append(source)
        subset["of"].append(cache.info.index_digest)
        prefix = f"{cache.path.name}/" if prefix_keys else ""
        if prefix_keys:
            subset["prefixes"].append(prefix)
        samples = np.setdiff1d(np.arange(len(cache)), cache.removed, assume_unique=True)

        # A cache without samples adds nothing, but the numbers of the sources after it stay.
        if len(samples):
            origins.append(_Origin(cache, samples, prefix, merged_path(number, "")))
    if not origins:
        names = " and ".join(str(cache.path) for cache in opened)
        raise DataError(f"expected samples to merge, got only removed ones in {names}")

    description = {**merged_description(sources), SUBSET: subset}
    return _copy(origins, description, open_path(out), features, "merge", to_progress(progress))


def _copy(
    origins: Sequence[_Origin],
    description: Mapping[str, Any],
    out_path: Path,
    features: str | Sequence[str],
    stage: str,
    progress: Progress,
) -> CopyReport:
    """Write the tables of the new cache, then the features of each encoder that all caches have."""
    caches = [origin.cache for origin in origins]
    features = [features] if isinstance(features, str) else features
    copied, left_out = _choose(caches, features)

    # Tables come first: a folder of other samples is refused before any feature is written.
    write = partial(_write_tables, origins)
    index_tables(description, write, out_path, chunk_size=caches[0].info.chunk_size, progress=progress)
    out = Cache(out_path)
    check_same(f"cache {out_path}", out.info.source, description, next_step="give the path of a new folder")

    # A description that this user indexed may be opened again without asking. So may a copy of such caches.
    if all(is_remembered(cache.info.source, cache.info.index_digest) for cache in caches):
        remember(out.info.source, out.info.index_digest)
    remove_partials(out.path)

    request = {"caches": [str(cache.path) for cache in caches], "features": list(features)}
    with record_stage(new_record_path(out.path, stage), stage, request) as outcome:
        feature_names: list[str] = []
        num_copied = 0
        num_reused = 0
        for groups, names in copied:
            # The samples of a selection may have no item of a modality.
            if groups[0].modality in out.info.num_items:
                filled = _copy_group(origins, groups, names, out, progress)
                num_copied += filled.computed
                num_reused += filled.reused
                feature_names += [f"{groups[0].modality}/{groups[0].name}/{name}" for name in names]
        report = CopyReport(
            cache=out.path,
            num_samples=out.info.num_samples,
            features=feature_names,
            left_out=left_out,
            copied=num_copied,
            reused=num_reused,
        )

        # A repeated call that finds everything copied leaves no record.
        if report.copied or not feature_names:
            outcome |= {"num_samples": report.num_samples, "features": report.features, "left_out": left_out}
    return report


def _copy_group(
    origins: Sequence[_Origin], groups: Sequence[EncoderGroup], names: Sequence[str], out: Cache, progress: Progress
) -> FillReport:
    """Copy the features of one encoder."""
    first = groups[0]

    # Refuses features of one name that were fitted to something else.
    group = create_group(
        out.path,
        first.modality,
        first.name,
        out.info,
        spec=first.spec,
        fingerprint=first.fingerprint,
        view=first.view,
    )
    if "fit" in first.fingerprint:
        write_atomic(fit_path(group.path), checked_fit_path(first.path, first.fingerprint).read_bytes())
    return fill(group, _CopiedFeatures(origins, groups, names), progress=progress)


def _choose(
    caches: Sequence[Cache], features: Sequence[str]
) -> tuple[list[tuple[list[EncoderGroup], list[str]]], list[str]]:
    """Return the folders of each encoder that all caches have, with its features, and the names of features left out.

    Raises:
        UnknownNameError: no cache has a feature that is named.
        FingerprintError: an encoder, or a feature, differs between caches.
    """
    groups_by_name: dict[tuple[str, str], list[EncoderGroup]] = {}
    for cache in caches:
        for modality in cache.info.num_items:
            for group in cache.encoders(modality):
                groups_by_name.setdefault((modality, group.name), []).append(group)
    _check_names(features, groups_by_name, caches[0].path)

    chosen = []
    left_out = []
    for (modality, name), groups in sorted(groups_by_name.items()):
        # A cache without items of the modality needs no features of it.
        num_with_items = sum(modality in cache.info.num_items for cache in caches)
        counts = Counter(feature for group in groups for feature in group.features)
        common = []
        for feature in sorted(counts):
            if features and name not in features and f"{name}/{feature}" not in features:
                continue
            if counts[feature] == num_with_items:
                common.append(feature)
            else:
                left_out.append(f"{modality}/{name}/{feature}")

        if common:
            _check_same(groups, common)
            chosen.append((groups, common))
    return chosen, left_out


def _check_names(
    features: Sequence[str], groups_by_name: Mapping[tuple[str, str], Sequence[EncoderGroup]], path: Path
) -> None:
    """Check that a cache has each feature or encoder that is named."""
    encoder_names = set()
    feature_names: set[str] = set()
    for (_, name), groups in groups_by_name.items():
        encoder_names.add(name)
        for group in groups:
            feature_names.update(f"{name}/{feature}" for feature in group.features)
    for feature in features:
        if feature not in feature_names and feature not in encoder_names:
            raise unknown_name("feature", feature, feature_names, where=f"of {path}")


def _check_same(groups: Sequence[EncoderGroup], names: Sequence[str]) -> None:
    """Check that the features of an encoder are complete, and the same outputs of the same encoder in all caches."""
    next_step = "merge caches of the same encoders, or name others with --feature"
    first = groups[0]
    for group in groups:
        title = f"{group.name} of {group.path.parents[1]}"
        check_same(title, group.fingerprint, first.fingerprint, next_step=next_step)
        for name in names:
            Feature(group, name).require_complete()
            stored = read_feature(group, name).to_json()
            expected = read_feature(first, name).to_json()
            check_same(f"feature {name} of {title}", stored, expected, next_step=next_step)


class _CopiedFeatures:
    """Producer that reads the features of one encoder from other caches. Memory: one chunk of a cache."""

    verb: Verb = "copied"

    def __init__(self, origins: Sequence[_Origin], groups: Sequence[EncoderGroup], names: Sequence[str]) -> None:
        self.outputs = {name: Output.of(Feature(groups[0], name)) for name in names}
        self._groups = groups
        modality = groups[0].modality
        rows = []
        for origin in origins:
            if modality in origin.cache.info.num_items:
                samples_N = origin.cache.items(modality, columns=["sample"])["sample"].to_numpy()
                rows.append(np.flatnonzero(np.isin(samples_N, origin.samples)))

        # The folder of each item, and its row there.
        self._numbers = np.repeat(np.arange(len(rows)), list(map(len, rows)))
        self._rows = np.concatenate(rows)

        # Items are copied in the order of their rows, so each chunk is read once.
        self._read = lru_cache(maxsize=1)(self._read_chunk)

    def compute(self, rows: slice) -> ChunkFeatures:
        """Return the features of items as they are in the other caches, checksums compared."""
        items: defaultdict[str, list[Array | None]] = defaultdict(list)
        failures: defaultdict[str, list[str | None]] = defaultdict(list)
        hashes: list[bytes | None] = []
        for number, row in zip(self._numbers[rows].tolist(), self._rows[rows].tolist(), strict=True):
            group = self._groups[number]
            chunk, offset = divmod(row, group.info.chunk_size)
            stored = self._read(number, chunk)
            hashes.append(stored.hashes[offset])
            for name in self.outputs:
                items[name].append(stored.items[name][offset])
                failures[name].append(stored.failures[name][offset])
        return ChunkFeatures(items, hashes, failures)

    def retries(self, _: Commit) -> bool:
        """Return False, because an item that failed in the other cache has no feature to copy."""
        return False

    def _read_chunk(self, number: int, chunk: int) -> ChunkFeatures:
        group = self._groups[number]
        commit = group.commit(chunk)

        # All chunks were there when the copy began.
        if commit is None:
            raise UnfinishedError(
                f"chunk {chunk} of {group.path} is being written again by another process; wait for it, and run the "
                "same command again"
            )

        items = {}
        failures = {}
        for name in self.outputs:
            items[name] = Feature(group, name).items(commit)
            failures[name] = list(commit.failures[name])
        return ChunkFeatures(items, list(commit.hashes), failures)


def _write_tables(origins: Sequence[_Origin], folder: Path, progress: Progress) -> list[Part]:
    """Write the samples of each cache into files of a part. Memory: some blocks of 65,536 samples."""
    progress.start("indexing", sum(len(origin.samples) for origin in origins), "samples")
    parts: list[Part] = []
    for number, origin in enumerate(origins):
        earlier_samples = Table(folder, [part.tables[SAMPLES] for part in parts])
        names = (SAMPLES, *origin.cache.info.num_items)
        readers = {name: RowReader(origin.cache, name, kept_rows=0) for name in names}
        writer = TableWriter(folder, number, len(earlier_samples))
        for rows in blocks(len(origin.samples), BLOCK):
            writer.add_tables(_read_tables(origin, origin.samples[rows], readers))
            progress.advance(rows.stop - rows.start)

        # A key that an earlier part has is an error of the users, who can prefix the keys.
        try:
            part = writer.close("", earlier_samples)
        except SourceError as error:
            raise DataError(f"{error}; with --prefix-keys each begins with the name of its cache") from error
        content = digest({name: file.checksum for name, file in part.tables.items()})
        parts.append(replace_fields(part, digest=content))
    progress.finish()
    return parts


def _read_tables(origin: _Origin, samples: Ints, readers: Mapping[str, RowReader]) -> SampleTables:
    """Read some samples with their items."""
    items = {}
    for modality in origin.cache.info.num_items:
        # Items count their samples from the first of the block.
        positions, item_rows = concatenated_ranges(*readers[modality].find(samples))
        table = readers[modality].take(item_rows).set_column(0, "sample", pa.array(positions))
        if MODALITIES[modality].kind != "texts":
            table = _with_prefix(origin.path_prefix, table, "path")
        items[modality] = table.select(ITEM_SCHEMAS[modality].names).cast(ITEM_SCHEMAS[modality])
    return SampleTables(_with_prefix(origin.key_prefix, readers[SAMPLES].take(samples), "key"), items)


def _with_prefix(prefix: str, table: pa.Table, name: str) -> pa.Table:
    """Return a table with a prefix before the strings of a column."""
    if not prefix:
        return table
    longer = pc.utf8_replace_slice(table[name], 0, 0, prefix)
    return table.set_column(table.schema.get_field_index(name), name, longer)
