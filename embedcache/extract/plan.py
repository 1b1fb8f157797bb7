"""Planning: estimate the items, bytes, memory and time of an extraction before it is run."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from embedcache.arrays import Array
from embedcache.encoders.base import Modality
from embedcache.errors import DiskFullError
from embedcache.extract.engines import Worker, count_processes, job_devices
from embedcache.extract.extract import join_encoders, open_job, open_request
from embedcache.extract.feature_writer import ChunkTask, FeatureWriter
from embedcache.extract.loop import encode_chunk
from embedcache.extract.settings import ExtractSettings
from embedcache.files import AnyPath, is_remote
from embedcache.progress import AnyProgress, to_progress
from embedcache.samples import Source
from embedcache.store.producer import ChunkFeatures
from embedcache.store.writer import num_padded
from embedcache.units import format_bytes

_PROBE_BATCHES = 4
_COMMIT_BYTES = 24
"""Per item in a commit: its hash, and sometimes the reason of a failure."""


@dataclass(frozen=True, kw_only=True)
class PlannedFeature:
    """Estimated size of one feature.

    Args:
        num_items: number of items in the chunks that lack it.
        num_rows: number of rows on disk: more than items where the last file is not full, as files have one size.
        item_bytes: bytes on disk per item; the mean of the probe where items differ in length.
    """

    name: str
    modality: Modality
    num_items: int
    num_rows: int
    item_bytes: float

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return round(self.num_rows * self.item_bytes + self.num_items * _COMMIT_BYTES)


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
            raise DiskFullError(
                f"{self.cache}: expected {format_bytes(self.num_bytes)} of free disk space, got "
                f"{format_bytes(self.free_bytes)}; "
                f"free {format_bytes(self.num_bytes - self.free_bytes)}, store fewer features, or use another disk"
            )


def plan(
    source: Source | object,
    cache: AnyPath,
    *,
    image_encoder: str | Sequence[str] = (),
    text_encoder: str | Sequence[str] = (),
    encoder: Mapping[str, str | Sequence[str]] | None = None,
    settings: ExtractSettings | None = None,
    progress: AnyProgress = None,
    **options: Any,
) -> Plan:
    """Index the source, open the encoders and encode a few batches without storing their outputs.

    The arguments and errors are those of `extract`.
    """
    progress = to_progress(progress)
    source, settings = open_request(source, cache, settings, options)
    specs = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, specs, settings=settings, progress=progress)
    worker = Worker(job, source=source, device=job_devices(job.settings)[0])
    features: list[PlannedFeature] = []
    rates: dict[Modality, float] = {}
    for modality, writers in worker.writers.items():
        chunks = worker.missing(modality)
        if chunks:
            rates[modality], encoded = _probe(worker, modality, chunks[0], job.settings.num_threads)
            for writer, probed in zip(writers, encoded, strict=True):
                for name, items in probed.items.items():
                    features.append(_plan_feature(writer, modality, name, chunks, items))
    return Plan(
        cache=worker.cache.path,
        features=features,
        rates=rates,
        num_processes=count_processes(job.settings),
        free_bytes=None if is_remote(worker.cache.path) else shutil.disk_usage(worker.cache.path).free,
        chunk_size=worker.cache.info.chunk_size,
    )


def _plan_feature(
    writer: FeatureWriter, modality: Modality, name: str, chunks: Sequence[int], items: Sequence[Array | None]
) -> PlannedFeature:
    """Return what a feature of one encoder lacks in `chunks`; `items` are the first ones, None where one failed."""
    missing_chunks = [chunk for chunk in chunks if name in writer.missing(chunk)]
    num_items = writer.group.info.count_items(modality, missing_chunks)
    sizes = [item.nbytes for item in items if item is not None]
    return PlannedFeature(
        name=f"{writer.group.name}/{name}",
        modality=modality,
        num_items=num_items,
        num_rows=num_padded(writer.group, name, num_items),
        item_bytes=fmean(sizes or [0]),
    )


def _probe(worker: Worker, modality: Modality, chunk: int, threads: int) -> tuple[float, list[ChunkFeatures]]:
    """Encode the first batches of a chunk; return items per second, without the first batch, and the features."""
    writers = worker.writers[modality]
    batch_size = max(writer.encoder.batch_size for writer in writers)
    num_items = min(_PROBE_BATCHES * batch_size, worker.cache.info.count_items(modality, [chunk]))
    num_warmup = max(1, num_items // _PROBE_BATCHES)

    def encode(rows: range) -> list[ChunkFeatures]:
        task = ChunkTask(chunk, {writer: writer.features for writer in writers}, rows)
        return encode_chunk(worker.cache, worker.source, task, threads=threads)

    encoded = encode(range(num_warmup))
    started = time.perf_counter()
    if num_items > num_warmup:
        encoded = encode(range(num_warmup, num_items))
    rate = max(num_items - num_warmup, 1) / max(time.perf_counter() - started, 1e-9)
    return rate, encoded
