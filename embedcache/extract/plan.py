"""What an extraction will take: items, bytes, time, before it is run."""

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.encoders.base import Modality
from embedcache.errors import DiskFullError
from embedcache.extract.engines import all_devices
from embedcache.extract.extract import open_job
from embedcache.extract.loop import Outputs, add_distinct, image_items, load_image, load_texts
from embedcache.extract.outputs import Target
from embedcache.extract.settings import ExtractSettings
from embedcache.extract.worker import Worker
from embedcache.files import is_remote
from embedcache.progress import NullProgress, Progress
from embedcache.sources.base import Source

_PROBE_BATCHES = 4
_COMMIT_BYTES = 24
"""Of a commit for one item: its hash, and a failure's reason now and then."""


@dataclass(frozen=True, kw_only=True)
class PlannedFeature:
    """What one feature will take.

    Args:
        name: `encoder/feature`.
        modality: `image` or `text`.
        num_items: items in the chunks that miss it.
        item_bytes: bytes an item on disk; of the probe's mean length where items differ in theirs.
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
    """What an extraction will take.

    Args:
        cache: where it goes.
        features: what will be made; none where nothing is missing.
        rates: modality -> items a second with all its encoders together, measured on one device.
        num_processes: devices that will share the work.
        free_bytes: space on the cache's disk; None behind a URL.
        chunk_size: items in a chunk.
    """

    cache: Path
    features: Sequence[PlannedFeature]
    rates: dict[Modality, float]
    num_processes: int
    free_bytes: int | None
    chunk_size: int

    @property
    def memory_bytes(self) -> int:
        """Memory for two chunks of outputs: one that is being encoded, and one that is being committed."""
        totals = [
            sum(feature.item_bytes for feature in self.features if feature.modality == modality)
            for modality in self.rates
        ]
        return round(2 * self.chunk_size * max(totals, default=0))

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all that is missing."""
        return sum(feature.num_bytes for feature in self.features)

    def hours(self, modality: Modality) -> float:
        """Time for one modality, on all devices."""
        num_items = max(feature.num_items for feature in self.features if feature.modality == modality)
        return num_items / self.rates[modality] / self.num_processes / 3600

    def require_space(self) -> None:
        """Refuse a plan that the disk cannot hold.

        Raises:
            DiskFullError: says how much is missing.
        """
        if self.free_bytes is not None and self.num_bytes > self.free_bytes:
            raise DiskFullError(
                f"the disk of {self.cache} has {self.free_bytes / 1e9:,.2f} GB free and the features take "
                f"{self.num_bytes / 1e9:,.2f} GB; free {(self.num_bytes - self.free_bytes) / 1e9:,.2f} GB, store fewer "
                "features, or put the cache elsewhere"
            )


def plan(
    source: Source,
    cache_path: Path | str,
    *,
    image: Sequence[str] = (),
    text: Sequence[str] = (),
    settings: ExtractSettings | None = None,
    extends: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Number the source, open the encoders and encode a few batches, without keeping what they give.

    The arguments and errors are those of `extract`.
    """
    progress = progress or NullProgress()
    job = open_job(source, cache_path, image=image, text=text, settings=settings, extends=extends, progress=progress)
    devices = job.settings.devices or all_devices()
    worker = Worker(job, source=source, device=devices[0])
    features: list[PlannedFeature] = []
    rates: dict[Modality, float] = {}
    for modality, targets in worker.targets.items():
        chunks = worker.missing(modality)
        if chunks:
            rates[modality], outputs = _probe(worker, modality, chunks[0], job.settings.threads)
            for target, output in zip(targets, outputs, strict=True):
                features += _planned(worker, modality, target, output, chunks)
    free = None if is_remote(worker.cache.path) else shutil.disk_usage(worker.cache.path).free
    num_processes = job.settings.num_actors or len(devices)
    return Plan(
        cache=worker.cache.path,
        features=features,
        rates=rates,
        num_processes=num_processes,
        free_bytes=free,
        chunk_size=worker.cache.info.chunk_size,
    )


def _planned(
    worker: Worker, modality: Modality, target: Target, output: Outputs, chunks: Sequence[int]
) -> list[PlannedFeature]:
    missing = {chunk: target.missing(chunk) for chunk in chunks}
    return [
        PlannedFeature(
            name=f"{target.group.name}/{name}",
            modality=modality,
            num_items=worker.count_items(modality, [chunk for chunk, names in missing.items() if name in names]),
            item_bytes=float(np.mean([item.nbytes for item in output.features[name] if item is not None] or [0])),
        )
        for name in target.features
    ]


def _probe(worker: Worker, modality: Modality, chunk: int, threads: int | None) -> tuple[float, list[Outputs]]:
    """Encode the first batches of a chunk; give items a second, the first batch left out, and what was made.

    Loading and encoding are timed one after the other: on a device of its own they overlap, and the truth is better.
    """
    targets = worker.targets[modality]
    num_items = _PROBE_BATCHES * max(target.encoder.batch_size for target in targets)
    with ThreadPoolExecutor(threads) as executor:
        if modality == "image":
            items: list[Any] = list(islice(image_items(worker.cache, chunk), num_items))
        else:
            items = worker.cache.items("text", chunk=chunk)["text"].to_pylist()[:num_items]
        num_warm = max(1, len(items) // _PROBE_BATCHES)
        outputs = _encode(worker, modality, items[:num_warm], executor)
        started = time.perf_counter()
        if len(items) > num_warm:
            outputs = _encode(worker, modality, items[num_warm:], executor)
        rate = max(len(items) - num_warm, 1) / max(time.perf_counter() - started, 1e-9)
    return rate, outputs


def _encode(worker: Worker, modality: Modality, items: Sequence[Any], executor: Executor) -> list[Outputs]:
    targets = worker.targets[modality]
    if modality == "image":
        loaded = list(executor.map(lambda item: load_image(worker.source, item, targets), items))
    else:
        loaded = load_texts(items, targets)
    outputs = [Outputs(target, target.features, len(loaded)) for target in targets]
    for number, output in enumerate(outputs):
        add_distinct(output, loaded, number)
    return outputs
