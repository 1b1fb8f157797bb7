"""Planning: estimate the items, bytes, memory and time of an extraction before it is run."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Unpack

from embedcache.encoders.base import Modality
from embedcache.errors import DiskFullError
from embedcache.extract.encode import Encoders, open_encoders
from embedcache.extract.extract import job_devices, join_encoders, open_job
from embedcache.extract.settings import ExtractSettings
from embedcache.files import AnyPath, is_remote, open_path
from embedcache.modalities import MODALITIES, Source
from embedcache.progress import AnyProgress, to_progress
from embedcache.settings import format_bytes
from embedcache.store.cache import Cache
from embedcache.store.producer import Target, add_features, find_unfinished
from embedcache.store.writer import ChunkFeatures

if TYPE_CHECKING:
    from embedcache.options import ExtractOptions

_PROBE_BATCHES = 4
_COMMIT_BYTES = 24
"""Per item in a commit: its hash, and sometimes the reason of a failure."""


@dataclass(frozen=True, kw_only=True)
class PlannedFeature:
    """Estimated size of one feature.

    Args:
        num_items: number of items in the chunks that lack it.
        item_bytes: bytes on disk per item; the mean of the probe where items differ in length.
    """

    name: str
    modality: Modality
    num_items: int
    item_bytes: float

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return round(self.num_items * (self.item_bytes + _COMMIT_BYTES))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimated size, memory and time of an extraction.

    Args:
        features: the features to compute; empty if nothing is missing.
        rates: modality -> items per second with all its encoders together, measured on one device.
        free_bytes: free space on the cache's disk; None behind a URL.
    """

    cache: Path
    features: Sequence[PlannedFeature]
    rates: dict[Modality, float]
    num_processes: int
    free_bytes: int | None
    chunk_size: int

    @property
    def memory_bytes(self) -> int:
        """Memory for the outputs of two chunks: one is being encoded while the other is committed."""
        totals = [
            sum(feature.item_bytes for feature in self.features if feature.modality == modality)
            for modality in self.rates
        ]
        return round(2 * self.chunk_size * max(totals, default=0))

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of everything that is missing."""
        return sum(feature.num_bytes for feature in self.features)

    def hours(self, modality: Modality) -> float:
        """Return the estimated time for one modality on all devices."""
        num_items = max(feature.num_items for feature in self.features if feature.modality == modality)
        return num_items / self.rates[modality] / self.num_processes / 3600

    def check_space(self) -> None:
        """Check that the disk can hold the features, or raise a `DiskFullError`."""
        if self.free_bytes is not None and self.num_bytes > self.free_bytes:
            needed, free = format_bytes(self.num_bytes), format_bytes(self.free_bytes)
            raise DiskFullError(f"{self.cache}: expected {needed} of free disk space, got {free}; store fewer features")


def plan(
    source: Source | object,
    cache: AnyPath,
    *,
    image_encoder: str | Sequence[str] = (),
    text_encoder: str | Sequence[str] = (),
    encoder: Mapping[str, str | Sequence[str]] | None = None,
    settings: ExtractSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["ExtractOptions"],
) -> Plan:
    """Index the source, open the encoders and encode a few batches without storing their outputs.

    The arguments and errors are those of `extract`.
    """
    progress = to_progress(progress)
    requested = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, requested, settings=settings, options=options, progress=progress)
    path = open_path(job.cache)
    features: list[PlannedFeature] = []
    rates: dict[Modality, float] = {}
    devices = job_devices(job.settings)
    for encoders in open_encoders(job, devices[0]):
        modality = MODALITIES[encoders.modality].name
        for target in encoders.targets:
            add_features(target)
        chunks = find_unfinished(encoders, shard=job.settings.shard_numbers)
        if chunks:
            rates[modality], encoded = _probe(encoders, min(chunks))
            for target in encoders.targets:
                features += _plan_features(target, chunks, encoded[target.group.name])
    return Plan(
        cache=path,
        features=features,
        rates=rates,
        num_processes=len(devices) if job.settings.engine == "local" else job.settings.actors or 1,
        free_bytes=None if is_remote(path) else shutil.disk_usage(path).free,
        chunk_size=Cache(path).info.chunk_size,
    )


def _plan_features(
    target: Target, chunks: Mapping[int, Mapping[str, Sequence[str]]], encoded: ChunkFeatures
) -> Iterator[PlannedFeature]:
    """Iterate over the features that one folder lacks in chunks; `encoded` are those of the first items."""
    group = target.group
    for name in target.outputs:
        missing_chunks = [chunk for chunk, missing in chunks.items() if name in missing.get(group.name, ())]
        num_items = group.info.count_items(group.modality, missing_chunks)
        sizes = [item.nbytes for item in encoded.items[name] if item is not None]
        yield PlannedFeature(
            name=f"{group.name}/{name}",
            modality=MODALITIES[group.modality].name,
            num_items=num_items,
            item_bytes=fmean(sizes or [0]),
        )


def _probe(encoders: Encoders, chunk: int) -> tuple[float, Mapping[str, ChunkFeatures]]:
    """Encode the first batches of a chunk; return items per second, without the first batch, and the features."""
    batch_size = max(folder.encoder.batch_size for folder in encoders.folders)
    num_items = min(_PROBE_BATCHES * batch_size, encoders.cache.info.count_items(encoders.modality, [chunk]))
    num_warmup = max(1, num_items // _PROBE_BATCHES)
    encoded = encoders.encode_rows(chunk, range(num_warmup))
    started = time.perf_counter()
    if num_items > num_warmup:
        encoded = encoders.encode_rows(chunk, range(num_warmup, num_items))
    rate = max(num_items - num_warmup, 1) / max(time.perf_counter() - started, 1e-9)
    return rate, encoded
