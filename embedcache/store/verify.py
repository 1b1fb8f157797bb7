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
        modality: name of a modality, or `samples` for the sample table.
        encoder: folder of the encoder, empty for a table.
        chunk: number of the chunk, or -1 for a table or the metadata of a feature.
        is_damage: whether bytes are wrong. False for a chunk that is not extracted.
        can_repair: whether writing the metadata, or encoding the chunk, again repairs it.
        reason: description of the damage, and the next step.
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
        UnfinishedError: there are findings, and samples were appended or removed meanwhile, which looks like damage.
    """
    progress = progress or NullProgress()
    findings = [*_check_removed(cache), *check_tables(cache, progress=progress)]

    # Chunks still contain the captions of removed samples, which would look like damage.
    if cache.info.has_interrupted_removal:
        return findings

    # A damaged table may count rows, and so chunks, that do not exist.
    damaged_tables = {finding.modality for finding in findings}
    features: list[Feature] = []
    num_chunks = 0
    for modality in cache.info.num_items:
        if modality not in damaged_tables:
            for encoder in encoder_names(cache.path / modality):
                encoder_features, damage = _open_features(cache, modality, encoder)
                features += encoder_features
                num_chunks += len(encoder_features) * cache.info.num_chunks(modality)
                findings += damage

    progress.start("verifying", num_chunks, "chunks")
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
    """Compare the files of the tables with their checksums and their numbers of rows."""
    progress = progress or NullProgress()
    files = []
    num_rows = 0
    for part in cache.info.parts:
        for name, file in part.tables.items():
            files.append((name, file))
            num_rows += file.num_rows

    progress.start("checking tables", num_rows, "rows")
    for name, file in files:
        try:
            check_table(cache.path, file)
        except (CorruptError, PathError) as error:
            yield Finding(modality=name, encoder="", name=file.name, can_repair=False, reason=str(error))
        progress.advance(file.num_rows)
    progress.finish()


def _open_features(cache: Cache, modality: str, encoder: str) -> tuple[list[Feature], list[Finding]]:
    """Open the features of an encoder, and return them with a finding for each that has unreadable metadata."""
    path = cache.path / modality / encoder
    finding = partial(Finding, modality=modality, encoder=encoder, can_repair=False)
    names = feature_names(path)

    try:
        group = open_group(cache.path, modality, encoder, cache.info)
    except (ArtifactError, PathError) as error:
        return [], [finding(name=name, reason=str(error)) for name in names or [""]]

    features: list[Feature] = []
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

        # A damaged commit counts as none here, because it is reported with its chunk.
        features.append(feature)
        findings += _check_metadata(feature, first_commit(path))
    return features, findings


def _check_metadata(feature: Feature, commit: Commit | None) -> Iterator[Finding]:
    """Compare the metadata of a feature's arrays, on which readers of Zarr rely, with the cache.

    A cache that was extended has longer arrays once the extraction goes on. Attributes that no commit confirms cannot
    be repaired, and attributes that a commit contradicts are reported with its chunk.
    """
    group = feature.group
    attributes = read_feature(group, feature.feature)
    committed_digest = None if commit is None else commit.attributes.get(feature.feature)
    if committed_digest not in (None, digest(attributes.to_json())):
        return

    # An array has the length of this version of the cache, or of an earlier one.
    versions: dict[Path, list[dict[str, Any]]] = {}
    for count in sorted(group.info.item_counts(feature.modality)):
        for folder, metadata in feature_metadata(group, feature.feature, attributes, num_items=count).items():
            versions.setdefault(folder, []).append(metadata)

    for folder, metadata_versions in versions.items():
        if not any(has_metadata(folder, metadata) for metadata in metadata_versions):
            yield Finding(
                modality=feature.modality,
                encoder=group.name,
                name=feature.feature,
                can_repair=committed_digest is not None,
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

        # Reading compares the bytes with their checksums.
        for _, items in feature.read_chunk(commit):
            if feature.is_ragged:
                for reason in _check_tokens(feature, chunk, items):
                    yield finding(reason=reason)
    except (ArtifactError, PathError) as error:
        yield finding(reason=str(error))
        return


def _check_tokens(feature: Feature, chunk: int, items: Sequence[Array | None]) -> Iterator[str]:
    """Iterate over the errors in the metadata of one chunk of tokens."""
    folder = feature.group.path / feature.feature / "values" / f"{chunk:05d}"
    num_tokens = 0
    for item in items:
        if item is not None:
            num_tokens += len(item)

    if not has_metadata(folder, token_metadata(num_tokens, feature.item_shape[1], feature.dtype)):
        yield f"{folder / 'zarr.json'} is missing or does not describe this array; {REPAIR}"
