"""Check every byte of a cache: missing, truncated, changed or foreign chunks, and changed tables and metadata."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.arrays import Array
from embedcache.errors import ArtifactError, CorruptError, PathError, UnfinishedError
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import digest
from embedcache.store.arrays import REPAIR, group_metadata, has_metadata, read_metadata
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit
from embedcache.store.feature import Feature, encoder_names, feature_names, first_commit, open_group, read_feature
from embedcache.store.layout import (
    INTERRUPTED_REMOVAL,
    SAMPLES,
    checked_fit_path,
    fit_path,
    info_path,
    read_info,
    removed_path,
)
from embedcache.store.tables import check_table, read_removed
from embedcache.store.writer import feature_metadata, token_metadata


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A chunk or table that is damaged or missing.

    Args:
        modality: name of a modality; `samples` for the sample table.
        encoder: folder of the encoder; empty for a table.
        chunk: number of the chunk; -1 for a table or the metadata of a feature.
        is_damage: whether bytes are wrong; false for a chunk that is not extracted.
        can_repair: whether writing the metadata, or encoding the chunk, again repairs it.
        reason: what is wrong, and the next step.
    """

    modality: str
    encoder: str
    name: str
    chunk: int = -1
    is_damage: bool = True
    can_repair: bool = True
    reason: str

    @property
    def location(self) -> str:
        """`encoder/feature`, or a table's name."""
        return f"{self.encoder}/{self.name}" if self.encoder else self.name

    def line(self) -> str:
        """Return the finding as one line."""
        chunk = "" if self.chunk < 0 else f" chunk {self.chunk}"
        return f"{self.location}{chunk}: {self.reason}"


def verify(cache: Cache, *, progress: Progress | None = None) -> list[Finding]:
    """Check every committed chunk against its commit, and every commit against the cache. Reads all features once.

    Finds missing chunks, changed bytes, truncated files, chunks from another encoder or for other rows, changed
    metadata and changed tables. Memory: one chunk.

    Raises:
        UnfinishedError: something is found, and samples were appended or removed meanwhile, which looks like damage.
    """
    progress = progress or NullProgress()
    findings, features = [*_check_removed(cache), *check_tables(cache, progress=progress)], []
    if cache.info.has_interrupted_removal:
        return findings  # captions of removed samples, which chunks have still, would look like damage
    without_rows = {finding.modality for finding in findings}
    for modality in cache.info.num_items:
        if modality in without_rows:
            continue  # it may count rows, and so chunks, that do not exist
        for encoder in encoder_names(cache.path / modality):
            opened, damage = _open_features(cache, modality, encoder)
            features += opened
            findings += damage
    progress.start("verifying", sum(cache.info.num_chunks(feature.modality) for feature in features), "chunks")
    for feature in features:
        for chunk in range(cache.info.num_chunks(feature.modality)):
            findings += list(_check_chunk(feature, chunk))
            progress.advance(1)
    progress.finish()
    if findings and read_info(cache.path).index_digest != cache.info.index_digest:
        raise UnfinishedError(
            f"{cache.path}: another process appended or removed samples while it was verified; verify it again once "
            "that one has ended"
        )
    return findings


def _check_removed(cache: Cache) -> Iterator[Finding]:
    """Check the table of removed samples, and that no removal was interrupted."""
    finding = partial(Finding, modality=SAMPLES, encoder="", can_repair=False)
    try:
        read_removed(cache.path, cache.info)
    except (CorruptError, PathError) as error:
        yield finding(name=removed_path(cache.path, cache.info.removed).name, reason=str(error))
    if cache.info.has_interrupted_removal:
        yield finding(name=info_path(cache.path).name, reason=INTERRUPTED_REMOVAL)


def check_tables(cache: Cache, *, progress: Progress | None = None) -> Iterator[Finding]:
    """Compare the files of the tables with their checksums, and with their numbers of rows."""
    progress = progress or NullProgress()
    files = [(name, file) for part in cache.info.parts for name, file in part.tables.items()]
    progress.start("checking tables", sum(file.num_rows for _, file in files), "rows")
    for name, file in files:
        try:
            check_table(cache.path, file)
        except (CorruptError, PathError) as error:
            yield Finding(modality=name, encoder="", name=file.name, can_repair=False, reason=str(error))
        progress.advance(file.num_rows)
    progress.finish()


def _open_features(cache: Cache, modality: str, encoder: str) -> tuple[list[Feature], list[Finding]]:
    """Open the features of an encoder; return a finding for each with unreadable metadata."""
    path = cache.path / modality / encoder
    finding = partial(Finding, modality=modality, encoder=encoder, can_repair=False)
    names = feature_names(path)
    try:
        group = open_group(cache.path, modality, encoder, cache.info)
    except (ArtifactError, PathError) as error:
        return [], [finding(name=name, reason=str(error)) for name in names or [""]]

    opened: list[Feature] = []
    findings: list[Finding] = []
    if not has_metadata(path, group_metadata(read_metadata(path)["attributes"])):
        reason = "it is not the metadata of a Zarr group; restore that file"
        findings.append(finding(name="zarr.json", reason=reason))
    if "fit" in group.fingerprint:
        try:
            checked_fit_path(path, group.fingerprint)
        except CorruptError as error:
            findings.append(finding(name=fit_path(path).name, reason=str(error)))
    for name in names:
        try:
            feature = Feature(group, name)
        except (ArtifactError, PathError) as error:
            findings.append(finding(name=name, reason=str(error)))
            continue
        opened.append(feature)
        findings += _check_metadata(feature, first_commit(path))  # a damaged commit is reported with its chunk
    return opened, findings


def _check_metadata(feature: Feature, commit: Commit | None) -> Iterator[Finding]:
    """Compare the metadata of a feature's arrays with what follows from the cache; readers of Zarr rely on it.

    A cache that was extended has longer arrays once the extraction goes on. Attributes that no commit confirms are no
    ground for a repair, and those that one contradicts are reported with its chunk.
    """
    group = feature.group
    attributes = read_feature(group, feature.feature)
    written = None if commit is None else commit.attributes.get(feature.feature)
    if written not in (None, digest(attributes.to_json())):
        return
    counts = group.info.item_counts(feature.modality)
    expected: dict[Path, list[dict[str, Any]]] = {}
    for count in sorted(counts):
        for folder, metadata in feature_metadata(group, feature.feature, attributes, num_items=count).items():
            expected.setdefault(folder, []).append(metadata)
    for folder, allowed in expected.items():
        if not any(has_metadata(folder, metadata) for metadata in allowed):
            yield Finding(
                modality=feature.modality,
                encoder=group.name,
                name=feature.feature,
                can_repair=written is not None,
                reason=f"{folder / 'zarr.json'} is missing or does not describe this array; {REPAIR}",
            )


def _check_chunk(feature: Feature, chunk: int) -> Iterator[Finding]:
    finding = partial(Finding, modality=feature.modality, encoder=feature.group.name, name=feature.feature, chunk=chunk)
    try:
        commit = feature.group.commit(chunk)
        if commit is None or not commit.is_complete(feature.feature):
            yield finding(is_damage=False, reason=f"not extracted yet; run the same {feature.group.command} again")
            return
        try:
            feature.check_attributes(commit)
        except CorruptError as error:
            yield finding(can_repair=False, reason=str(error))
            return
        for _, items in feature.read_chunk(commit):
            if feature.is_ragged:
                yield from (finding(reason=reason) for reason in _check_tokens(feature, chunk, items))
    except (ArtifactError, PathError) as error:
        yield finding(reason=str(error))
        return


def _check_tokens(feature: Feature, chunk: int, items: Sequence[Array | None]) -> Iterator[str]:
    """Return what is wrong with the metadata of one chunk of tokens."""
    folder = feature.group.path / feature.feature / "values" / f"{chunk:05d}"
    num_tokens = sum(len(item) for item in items if item is not None)
    if not has_metadata(folder, token_metadata(num_tokens, feature.item_shape[1], feature.dtype)):
        yield f"{folder / 'zarr.json'} is missing or does not describe this array; {REPAIR}"
