"""Going through every byte of a cache: what is missing, short, changed, foreign or out of order."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from embedcache.errors import ArtifactError, CorruptError, PathError
from embedcache.progress import NullProgress, Progress
from embedcache.store.cache import Cache
from embedcache.store.commit import NOT_YET, hash_item, read_commit
from embedcache.store.feature import Feature
from embedcache.store.group import open_group
from embedcache.store.layout import commit_path, items_path, samples_path
from embedcache.store.tables import TableDigest, open_table, table_errors

_FIRST = commit_path(Path(), 0)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One chunk, or table, that is not as it should be.

    Args:
        modality: `image` or `text`; `samples` for that table.
        encoder: name of its folder; empty for a table.
        name: name of the feature there, or of the table.
        chunk: its number; -1 for a table, or a feature's metadata.
        is_damage: whether bytes are wrong; a chunk that was never extracted is none.
        can_repair: whether encoding the chunk again mends it.
        reason: what is wrong, with the next step.
    """

    modality: str
    encoder: str
    name: str
    chunk: int
    is_damage: bool = True
    can_repair: bool = True
    reason: str

    @property
    def place(self) -> str:
        """`encoder/feature`, or a table's name."""
        return f"{self.encoder}/{self.name}" if self.encoder else self.name

    def line(self) -> str:
        """Say it in one line."""
        return f"{self.place}: {self.reason}" if self.chunk < 0 else f"{self.place} chunk {self.chunk}: {self.reason}"


def verify(cache: Cache, *, progress: Progress | None = None) -> list[Finding]:
    """Compare every committed chunk with its commit, and every commit with the cache. Reads all features once.

    Finds a missing chunk, a changed byte, a file cut short, a chunk of another encoder or of other rows, a table whose
    rows changed or changed places, and captions that are not those that were encoded. Memory: one chunk.

    Args:
        cache: the cache.
        progress: told about chunks.

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
    """Compare the tables with their digests. A cache of an earlier version may have none."""
    for name, digest in cache.info.tables.items():
        is_samples = name == "samples"
        path = samples_path(cache.path) if is_samples else items_path(cache.path, name)
        finding = partial(
            Finding, modality=name, encoder="", name=str(path.relative_to(cache.path)), chunk=-1, can_repair=False
        )
        num_rows = cache.info.num_samples if is_samples else cache.info.num_items[name]
        try:
            found = _digest(path, num_rows, columns=["key"] if is_samples else None)
        except (CorruptError, PathError) as error:
            yield finding(reason=str(error))
            continue
        if found != digest:
            yield finding(
                reason="its rows are not those that were numbered, or not in that order; put the file back, or extract "
                "into a new folder"
            )


def _digest(path: Path, num_rows: int, *, columns: Sequence[str] | None) -> str | None:
    """Get the digest over a table's first rows; None where it has not so many."""
    found = TableDigest()
    with table_errors(path), open_table(path) as table:
        for batch in table.iter_batches(columns=columns, use_threads=False):
            rows = pa.table(batch).slice(0, num_rows)
            found.update(rows)
            num_rows -= len(rows)
    return None if num_rows else found.hexdigest()


def _encoders(cache: Cache, modality: str) -> list[str]:
    """Name the folders of encoders, those too whose metadata is gone."""
    with_metadata = {path.parent.name for path in (cache.path / modality).glob("*/zarr.json")}
    return sorted(with_metadata | {path.parents[1].name for path in (cache.path / modality).glob(f"*/{_FIRST}")})


def _open_features(cache: Cache, modality: str, encoder: str) -> tuple[list[Feature], list[Finding]]:
    """Open the features of an encoder; give those whose metadata cannot be read as findings."""
    opened, findings = [], []
    names = {path.parent.name for path in (cache.path / modality / encoder).glob("*/zarr.json")}
    with suppress(ArtifactError, PathError):  # a damaged commit is found with its chunk
        commit = read_commit(cache.path / modality / encoder, 0)
        names |= set() if commit is None else commit.features.keys()
    for name in sorted(names):
        try:
            opened.append(Feature(open_group(cache.path, modality, encoder, cache.info), name))
        except (ArtifactError, PathError) as error:
            reason = f"{error}; remove what is left of that file and run the same embedcache extract again"
            findings.append(
                Finding(modality=modality, encoder=encoder, name=name, chunk=-1, can_repair=False, reason=reason)
            )
    return opened, findings


def _check_chunk(cache: Cache, feature: Feature, chunk: int) -> Iterator[Finding]:
    finding = partial(Finding, modality=feature.modality, encoder=feature.group.name, name=feature.feature, chunk=chunk)
    try:
        commit = feature.group.commit(chunk)
        if commit is None or NOT_YET in commit.failures.get(feature.feature, [NOT_YET]):
            yield finding(is_damage=False, reason="not extracted yet; run the same embedcache extract again")
            return
        for _ in feature.read_chunk(commit):
            pass
    except (ArtifactError, PathError) as error:
        yield finding(reason=str(error))
        return
    if feature.modality == "text":
        texts = cache.items("text", chunk=chunk)["text"].to_pylist()
        if [hash_item(text.encode()) for text in texts] != commit.hashes:
            reason = "the captions are not those that were encoded, or not in that order; extract into a new folder"
            yield finding(can_repair=False, reason=reason)
