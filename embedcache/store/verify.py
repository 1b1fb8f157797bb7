"""Check every byte of a cache: missing, truncated, changed or foreign chunks, and changed tables."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from embedcache.errors import ArtifactError, CorruptError, PathError
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import digest as digest_json
from embedcache.provenance import digest_file
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, hash_item, open_group, read_commit, read_feature
from embedcache.store.layout import commit_path, fit_path, items_path, samples_path
from embedcache.store.tables import TableDigest, open_table, table_errors

_FIRST_COMMIT = commit_path(Path(), 0)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A chunk or table that is damaged or missing.

    Args:
        modality: name of a modality; `samples` for the sample table.
        encoder: folder of the encoder; empty for a table.
        chunk: number of the chunk; -1 for a table or the metadata of a feature.
        is_damage: whether bytes are wrong; false for a chunk that was never extracted.
        can_repair: whether encoding the chunk again repairs it.
        reason: what is wrong, and the next step.
    """

    modality: str
    encoder: str
    name: str
    chunk: int
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

    Finds missing chunks, changed bytes, truncated files, chunks from another encoder or for other rows, changed or
    reordered tables, and captions that changed after they were encoded. Memory: one chunk.
    """
    progress = progress or NullProgress()
    findings, features = list(_check_tables(cache)), []
    for modality in cache.info.num_items:
        for encoder in _encoders(cache, modality):
            opened, damage = _open_features(cache, modality, encoder)
            features += opened
            findings += damage
    progress.start("verifying", sum(cache.info.num_chunks(feature.modality) for feature in features), "chunks")
    for feature in features:
        for chunk in range(cache.info.num_chunks(feature.modality)):
            findings += list(_check_chunk(cache, feature, chunk))
            progress.advance(1)
    progress.finish()
    return findings


def _check_tables(cache: Cache) -> Iterator[Finding]:
    """Compare the tables with their digests, which the first caches lack."""
    for name, digest in cache.info.table_digests.items():
        is_samples = name == "samples"
        path = samples_path(cache.path) if is_samples else items_path(cache.path, name)
        finding = partial(
            Finding, modality=name, encoder="", name=str(path.relative_to(cache.path)), chunk=-1, can_repair=False
        )
        num_rows = cache.info.num_samples if is_samples else cache.info.num_items[name]
        try:
            actual_digest = _digest(path, num_rows, columns=["key"] if is_samples else None)
        except (CorruptError, PathError) as error:
            yield finding(reason=str(error))
            continue
        if actual_digest != digest:
            yield finding(
                reason="its rows or their order changed since they were indexed; restore the file, or extract into a "
                "new folder"
            )


def _digest(path: Path, num_rows: int, *, columns: Sequence[str] | None) -> str | None:
    """Return the digest of the first rows of a table; None if it has fewer."""
    table_digest = TableDigest()
    with table_errors(path), open_table(path) as table:
        for batch in table.iter_batches(columns=columns, use_threads=False):
            rows = pa.table(batch).slice(0, num_rows)
            table_digest.update(rows)
            num_rows -= len(rows)
    return None if num_rows else table_digest.hexdigest()


def _encoders(cache: Cache, modality: str) -> list[str]:
    """Return the folders of encoders, also those that lost their metadata."""
    with_metadata = {path.parent.name for path in (cache.path / modality).glob("*/zarr.json")}
    return sorted(with_metadata | {path.parents[1].name for path in (cache.path / modality).glob(f"*/{_FIRST_COMMIT}")})


def _open_features(cache: Cache, modality: str, encoder: str) -> tuple[list[Feature], list[Finding]]:
    """Open the features of an encoder; return a finding for each with unreadable metadata."""
    opened: list[Feature] = []
    findings: list[Finding] = []
    names = {path.parent.name for path in (cache.path / modality / encoder).glob("*/zarr.json")}
    with suppress(ArtifactError, PathError):  # a damaged commit is reported with its chunk
        commit = read_commit(cache.path / modality / encoder, 0)
        names |= set() if commit is None else commit.features.keys()
    with suppress(ArtifactError, PathError):  # damaged metadata is reported with each feature
        findings += _check_fit(open_group(cache.path, modality, encoder, cache.info))
    for name in sorted(names):
        try:
            opened.append(Feature(open_group(cache.path, modality, encoder, cache.info), name))
        except (ArtifactError, PathError) as error:
            reason = f"{error}; remove that file and run the same embedcache extract or derive again"
            findings.append(
                Finding(modality=modality, encoder=encoder, name=name, chunk=-1, can_repair=False, reason=reason)
            )
    return opened, findings


def _check_fit(group: EncoderGroup) -> list[Finding]:
    """Check the arrays that the rule of derived features was fitted to."""
    path = fit_path(group.path)
    if "fit" not in group.fingerprint or (path.is_file() and digest_file(path) == group.fingerprint["weights"]):
        return []
    reason = "missing or changed since the features were derived with it; restore it, or derive under another name"
    return [
        Finding(modality=group.modality, encoder=group.name, name=path.name, chunk=-1, can_repair=False, reason=reason)
    ]


def _check_chunk(cache: Cache, feature: Feature, chunk: int) -> Iterator[Finding]:
    finding = partial(Finding, modality=feature.modality, encoder=feature.group.name, name=feature.feature, chunk=chunk)
    try:
        commit = feature.group.commit(chunk)
        if commit is None or not commit.is_complete(feature.feature):
            yield finding(is_damage=False, reason=f"not extracted yet; run the same {feature.group.command} again")
            return
        written = commit.attributes.get(feature.feature)
        if written not in (None, digest_json(read_feature(feature.group, feature.feature))):
            yield finding(can_repair=False, reason="the attributes of its zarr.json have changed; restore that file")
            return
        for _ in feature.read_chunk(commit):
            pass
    except (ArtifactError, PathError) as error:
        yield finding(reason=str(error))
        return
    if feature.modality == "text":
        texts = cache.items("text", chunk=chunk)["text"].to_pylist()
        if [hash_item(text.encode()) for text in texts] != commit.hashes:
            reason = "the captions or their order changed since they were encoded; extract into a new folder"
            yield finding(can_repair=False, reason=reason)
