"""What changed in a source since a cache numbered it: samples that are new, items whose bytes lie elsewhere."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

from embedcache.errors import FingerprintError
from embedcache.progress import Progress
from embedcache.sources.base import ImageItem, Sample
from embedcache.store.layout import CacheInfo
from embedcache.store.tables import BATCH, digest_input, read_numbered


@dataclass(kw_only=True)
class Changes:
    """What is different now.

    Args:
        digests: SHA-256 over the samples of each part as the source gives them now.
        moved: image row -> where its bytes are now.
        num_new: samples that the cache does not number.
        new_digest: SHA-256 over those.
    """

    digests: Sequence[str]
    moved: dict[int, ImageItem] = field(default_factory=dict)
    num_new: int = 0
    new_digest: str = ""


def find_changes(
    cache_path: Path,
    info: CacheInfo,
    samples: Iterator[Sample],
    *,
    on_new: Callable[[list[Sample]], None],
    progress: Progress,
) -> Changes:
    """Compare a source with a cache, sample by sample. Every part's samples must come in its order.

    New samples may stand anywhere, as a new file in a sorted folder does. Memory: one batch.

    Args:
        cache_path: the cache.
        info: its `cache.json`.
        samples: those of the source.
        on_new: gets the samples that are new, in batches.
        progress: told the number of samples.

    Raises:
        FingerprintError: a sample is gone, stands elsewhere, or says something else than it did.
    """
    parts = [_Follower(cache_path, info, rows) for rows in _part_rows(info)]
    fresh, moved = _Batch(on_new), dict[int, ImageItem]()
    progress.start("comparing samples", info.num_samples, "samples")
    for sample in samples:
        part = next((part for part in parts if part.is_next(sample)), None)
        if part is None:
            fresh.add(sample)
        else:
            moved |= part.follow(sample)
        progress.advance(1)
    progress.finish()
    for part in parts:
        part.close()
    fresh.flush()
    return Changes(
        digests=[part.batch.digest.hexdigest() for part in parts],
        moved=moved,
        num_new=fresh.count,
        new_digest=fresh.digest.hexdigest(),
    )


def changed(
    cache_path: Path, info: CacheInfo, reason: str, *, next_step: str = "extract into a new folder"
) -> FingerprintError:
    """Make the error for a source that is not what a cache was made from."""
    made_from = f"{info.source.get('type')} {info.source.get('path', '')}".strip()
    return FingerprintError(
        f"cache {cache_path} numbers other samples than this source has now: {reason}; it was made from {made_from}; "
        f"{next_step}"
    )


def _part_rows(info: CacheInfo) -> list[range]:
    stops = list(accumulate(part.num_samples for part in info.all_parts))
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


class _Batch:
    """Samples that wait to be digested, and given on, together."""

    def __init__(self, give: Callable[[list[Sample]], None]) -> None:
        self.digest = hashlib.sha256()
        self.count = 0
        self._give = give
        self._waiting: list[Sample] = []

    def add(self, sample: Sample) -> None:
        self._waiting.append(sample)
        if len(self._waiting) == BATCH:
            self.flush()

    def flush(self) -> None:
        self.digest.update(digest_input(self._waiting))
        self.count += len(self._waiting)
        if self._waiting:
            self._give(self._waiting)
        self._waiting = []


class _Follower:
    """Goes along one part of a cache while the source's samples come."""

    def __init__(self, cache_path: Path, info: CacheInfo, rows: range) -> None:
        self.batch = _Batch(lambda _: None)
        self._cache_path, self._info = cache_path, info
        self._numbered = read_numbered(cache_path, rows)
        self._next = next(self._numbered, None)

    def is_next(self, sample: Sample) -> bool:
        return self._next is not None and self._next.key == sample.key

    def follow(self, sample: Sample) -> dict[int, ImageItem]:
        """Take the next sample; give image row -> item where bytes lie elsewhere now."""
        assert self._next is not None
        numbered, self._next = self._next, next(self._numbered, None)
        self.batch.add(sample)
        if [text.text for text in sample.texts] != [text for text, _ in numbered.texts]:
            raise changed(self._cache_path, self._info, f"sample {sample.key!r} has other captions")
        if [item.path for item in sample.images] != [item.path for item in numbered.images]:
            raise changed(self._cache_path, self._info, f"sample {sample.key!r} has other images")
        return {
            row: now
            for row, (now, then) in enumerate(zip(sample.images, numbered.images, strict=True), numbered.image_row)
            if now != then
        }

    def close(self) -> None:
        self.batch.flush()
        if self._next is not None:
            reason = f"sample {self._next.key!r} is gone, or stands elsewhere"
            raise changed(self._cache_path, self._info, reason)


def batches(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Cut samples into lists of `BATCH`."""
    while batch := list(islice(samples, BATCH)):
        yield batch
