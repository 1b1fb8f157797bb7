"""Going through every byte of a cache: what is missing, short, changed, foreign or out of order."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from embedcache.cache.cache import Cache
from embedcache.cache.commit import NOT_YET, hash_item
from embedcache.cache.feature import Feature
from embedcache.cache.layout import items_path, samples_path
from embedcache.cache.tables import TableDigest, open_table, table_errors
from embedcache.errors import ArtifactError
from embedcache.progress import Progress, Silent


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One chunk, or table, that is not as it should be.

    Args:
        modality: `image` or `text`; `samples` for that table.
        encoder: name of its folder; empty for a table.
        name: name of the feature there, or of the table.
        chunk: its number; -1 for a table.
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

    Raises:
        CorruptError: a table, or an encoder's metadata, cannot be read at all.
    """
    progress = progress or Silent()
    features = [feature for modality in cache.info.num_items for feature in cache.features(modality)]
    progress.start("verifying", sum(cache.info.num_chunks(feature.modality) for feature in features), "chunks")
    findings = list(_check_tables(cache))
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
        found, left = TableDigest(), cache.info.num_samples if is_samples else cache.info.num_items[name]
        with table_errors(path), open_table(path) as table:
            for batch in table.iter_batches(columns=["key"] if is_samples else None, use_threads=False):
                rows = pa.table(batch).slice(0, left)
                found.update(rows)
                left -= len(rows)
        if left or found.hexdigest() != digest:
            yield Finding(
                modality=name,
                encoder="",
                name=str(path.relative_to(cache.path)),
                chunk=-1,
                can_repair=False,
                reason="its rows are not those that were numbered, or not in that order; put the file back, or extract "
                "into a new folder",
            )


def _check_chunk(cache: Cache, feature: Feature, chunk: int) -> Iterator[Finding]:
    finding = partial(Finding, modality=feature.modality, encoder=feature.group.name, name=feature.feature, chunk=chunk)
    try:
        commit = feature.group.commit(chunk)
        if commit is None or NOT_YET in commit.failures.get(feature.feature, [NOT_YET]):
            yield finding(is_damage=False, reason="not extracted yet; run the same embedcache extract again")
            return
        for _ in feature.read_chunk(commit):
            pass
    except ArtifactError as error:
        yield finding(reason=str(error))
        return
    if feature.modality == "text":
        texts = cache.items("text", chunk=chunk)["text"].to_pylist()
        if [hash_item(text.encode()) for text in texts] != commit.hashes:
            reason = "the captions are not those that were encoded, or not in that order; extract into a new folder"
            yield finding(can_repair=False, reason=reason)
