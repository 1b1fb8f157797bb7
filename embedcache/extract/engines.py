"""Engines that run an extraction: the devices of this machine, or the actors of a Ray cluster.

Each device or actor has a worker, which opens the encoders and encodes the chunks that it leases. In a cluster, actors
hold the encoders and each chunk is a task; Ray repeats the tasks of a machine that was lost.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from embedcache.devices import AUTO, all_devices, announce_device
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import EncoderSpec, auto_precision, open_encoder, recorded_settings
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.views import open_view
from embedcache.errors import EmbedcacheError, SourceError, UnfinishedError, first_few
from embedcache.extract.feature_writer import (
    ChunkTask,
    CpuGate,
    FeatureWriter,
    check_features,
    choose_features,
    create_writer,
    lease_chunk,
    lease_free_chunks,
)
from embedcache.extract.loop import encode_chunks
from embedcache.extract.settings import ExtractJob, ExtractSettings
from embedcache.files import open_path
from embedcache.locks import divided_work, has_locks
from embedcache.modalities import MODALITIES, encoder_option, noun
from embedcache.processes import connected, num_cores, run_processes
from embedcache.progress import NullProgress, Progress
from embedcache.registry import trust_files
from embedcache.samples import Source
from embedcache.settings import replace_fields
from embedcache.sources.reopen import open_below
from embedcache.store.cache import Cache
from embedcache.store.group import find_group

_RESULT_TIMEOUT_S = 30.0
"""Time without a result after which the chunks of an actor that Ray cannot restart are given to an idle one."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What one or more processes encoded for one feature writer.

    Args:
        encoder: name of its folder.
        chunks: chunk -> number of items that were encoded.
    """

    modality: str
    encoder: str
    features: tuple[str, ...]
    chunks: Mapping[int, int]


def run_engine(job: ExtractJob, source: Source, progress: Progress) -> list[ShardReport]:
    """Encode all missing chunks with the engine named in the settings; an error in one process ends the others.

    Raises:
        UnfinishedError: all worker processes died, or one that had chunks of its own.
        MissingExtraError: Ray is not installed.
    """
    return {"local": _run_local, "ray": _run_ray}[job.settings.engine](job, source, progress)


def count_processes(settings: ExtractSettings) -> int:
    """Return the number of devices or actors that would share the work."""
    if settings.engine == "local":
        return len(job_devices(settings))
    with connected(settings.address) as ray:
        return _count_actors(ray, settings)


def job_devices(settings: ExtractSettings) -> tuple[str, ...]:
    """Return the devices that share the work on this machine: those named, else all GPUs; onnxruntime is on the CPU."""
    if settings.devices not in ((), (AUTO,)):
        return settings.devices
    return ("cpu",) if settings.encoder.backend == "onnxruntime" else all_devices()


def _run_local(job: ExtractJob, source: Source, progress: Progress) -> list[ShardReport]:
    """Encode on the devices of this machine: in this process if there is one, else in one process per device.

    Processes lease chunks one by one, and finish the chunks of one that was killed. Behind a URL, and on a
    file system without record locks, nothing can be leased, and each has a fixed part of the chunks instead.
    """
    devices = job_devices(job.settings)
    for device in devices:
        announce_device(device)
    count = len(devices)
    if count == 1:
        return Worker(job, source=source, device=devices[0]).run(progress)
    is_split = not has_locks(open_path(job.cache))
    threads = max(1, num_cores() // count)
    parts = [job.settings.split_shard(number, count) if is_split else job.settings for number in range(count)]
    reports, num_died = run_processes(
        _run_device,
        [(replace(job, settings=part), device, threads) for part, device in zip(parts, devices, strict=True)],
        progress,
        is_shared=True,
    )
    if num_died and (is_split or not reports):
        raise UnfinishedError(
            f"{num_died} of {count} worker processes died; finished chunks are stored; run the same command again"
        )
    if num_died:
        progress.note(f"{num_died} of {count} worker processes died; the others finished their chunks")
    return _merge_reports(report for process_reports in reports for report in process_reports)


def _run_device(task: tuple[ExtractJob, str, int], progress: Progress) -> list[ShardReport]:
    """Run in a worker process: encode on one device with a fixed number of threads."""
    import torch

    job, device, threads = task
    torch.set_num_threads(threads)  # also for encoders that stay on the CPU
    settings = replace_fields(job.settings, threads=job.settings.threads or threads)
    return Worker(replace(job, settings=settings), device=device).run(progress)


class Worker:
    """The open encoders of a job on one device, and the chunks that they encode.

    Args:
        source: the job's source, if this process has it open already; None opens it for items in files.

    Raises:
        SourceError: the source lacks a modality.
        UnknownNameError: an encoder, feature or view is unknown.
        FingerprintError: the cache holds features of another encoder of that name.
    """

    def __init__(self, job: ExtractJob, *, source: Source | None = None, device: str = "cpu") -> None:
        self.cache = Cache(job.cache)
        if source is None and any(MODALITIES[modality].kind == "files" for modality in job.encoders):
            with trust_files():  # the process that made the job has opened this source
                source = open_below(job.source, job.places)
        self.source = source
        self.settings = job.settings
        self.writers = _open_writers(self.cache, job, device)

    def missing(self, modality: Modality) -> list[int]:
        """Return the chunks of this shard that lack a feature."""
        return [chunk for chunk in self._chunks(modality) if any(w.missing(chunk) for w in self.writers[modality])]

    def _chunks(self, modality: Modality) -> list[int]:
        return list(filter(self.settings.is_in_shard, range(self.cache.info.num_chunks(modality))))

    def run(self, progress: Progress | None = None) -> list[ShardReport]:
        """Encode every missing chunk of the shard."""
        progress = progress or NullProgress()
        self._take_part()
        reports = self.empty_reports()
        for modality in self.writers:
            chunks = self.missing(modality)
            if chunks:
                progress.start(_step_name(modality), self.cache.info.count_items(modality, chunks), noun(modality))
                reports += self.encode(modality, chunks, progress)
                progress.finish()
        return _merge_reports(reports)

    def _take_part(self) -> None:
        """Take part in the work on every folder that lacks a chunk, so that nobody deletes one before its turn."""
        with divided_work(is_divided=self.settings.is_divided):
            for modality, writers in self.writers.items():
                chunks = self._chunks(modality)
                for writer in writers:
                    if any(map(writer.missing, chunks)):
                        writer.leases.take_part()

    def encode(self, modality: Modality, chunks: Sequence[int], progress: Progress) -> list[ShardReport]:
        """Encode chunks: first those that no other process works on, then those that other processes did not finish."""
        writers, encoded = self.writers[modality], defaultdict[str, dict[int, int]](dict)

        def encode_all(tasks: Iterable[ChunkTask]) -> None:
            recorded = _record_chunks(tasks, encoded)
            encode_chunks(self.cache, self.source, modality, recorded, progress, threads=self.settings.num_threads)

        with divided_work(is_divided=self.settings.is_divided):
            encode_all(lease_free_chunks(writers, chunks))
            for chunk in chunks:
                for writer in writers:
                    if writer.missing(chunk, refresh=True):
                        encode_all([lease_chunk(writer, chunk)])
        return [_report(writer, encoded[writer.group.name]) for writer in writers]

    def empty_reports(self) -> list[ShardReport]:
        """Return one report per feature writer, without chunks."""
        return [_report(writer, {}) for writers in self.writers.values() for writer in writers]


def _step_name(modality: Modality) -> str:
    """Return the name under which progress of a modality is reported."""
    return f"encoding {noun(modality)}"


def _merge_reports(reports: Iterable[ShardReport]) -> list[ShardReport]:
    """Merge the reports of several processes into one per feature writer, in the order of first appearance."""
    merged: dict[tuple[str, str], ShardReport] = {}
    for report in reports:
        earlier = merged.get((report.modality, report.encoder), report)
        merged[report.modality, report.encoder] = replace(report, chunks={**earlier.chunks, **report.chunks})
    return list(merged.values())


def _open_writers(cache: Cache, job: ExtractJob, device: str) -> dict[Modality, list[FeatureWriter]]:
    specs: Mapping[Modality, Sequence[EncoderSpec]] = {
        modality: [EncoderSpec.parse(spec) for spec in requested] for modality, requested in job.encoders.items()
    }
    for modality in specs:
        if not cache.info.num_items.get(modality):
            option = encoder_option(modality)
            columns = f"; columns without a role are {first_few(names, 10)}" if (names := cache.columns[1:]) else ""
            raise SourceError(f"{cache.path} has no {modality} items; omit {option}, or check the source{columns}")
    encoders: dict[Modality, list[Encoder]] = {
        modality: [
            open_encoder(spec, modality=modality, settings=_encoder_settings(cache, job, modality, spec, device))
            for spec in requested
        ]
        for modality, requested in specs.items()
    }
    check_features([encoder for group in encoders.values() for encoder in group], job.settings.features)
    gate = CpuGate(device, cores=min(num_cores(), job.settings.num_threads))
    dtype = job.settings.dtype
    views = [open_view(name) for name in job.settings.views]
    writers: dict[Modality, list[FeatureWriter]] = {}
    for modality, modality_encoders in encoders.items():
        writers[modality] = []
        for spec, encoder in zip(specs[modality], modality_encoders, strict=True):
            features = choose_features(encoder, job.settings.features)
            executor = ThreadPoolExecutor(1, thread_name_prefix=spec.folder)  # shared by the encoder's views
            writers[modality] += [
                create_writer(cache, spec, encoder, features, dtype, view=view, executor=executor, gate=gate)
                for view in [None, *(view for view in views if view.modality == modality)]
            ]
    return writers


def _encoder_settings(
    cache: Cache, job: ExtractJob, modality: Modality, spec: EncoderSpec, device: str
) -> EncoderSettings:
    """Return how an encoder runs: what is `auto` is as recorded with its features, or else as the job says."""
    settings = replace_fields(job.settings.encoder, device=device, features=job.settings.features)
    stored = find_group(cache.path, modality, spec.folder, cache.info)
    if stored is None:
        return (
            replace_fields(settings, precision=auto_precision(spec, device)) if settings.precision == AUTO else settings
        )
    recorded = recorded_settings(stored.fingerprint, device)
    if settings.backend == AUTO:
        settings = replace_fields(settings, backend=recorded["backend"], device=recorded["device"])
    return replace_fields(settings, precision=recorded["precision"]) if settings.precision == AUTO else settings


def _record_chunks(tasks: Iterable[ChunkTask], encoded: Mapping[str, dict[int, int]]) -> Iterator[ChunkTask]:
    """Iterate over tasks, and record each chunk and its number of items for its encoder's folder."""
    for task in tasks:
        for writer in task.missing:
            encoded[writer.group.name][task.chunk] = len(task.rows)
        if task.missing:
            yield task


def _report(writer: FeatureWriter, chunks: Mapping[int, int]) -> ShardReport:
    return ShardReport(
        modality=writer.group.modality,
        encoder=writer.group.name,
        features=tuple(writer.features),
        chunks=dict(chunks),
    )


def _run_ray(job: ExtractJob, _: Source, progress: Progress) -> list[ShardReport]:
    """Encode on a cluster whose machines all see the cache and the source; each actor opens its own source."""
    with connected(job.settings.address) as ray:
        actors = _start_actors(ray, job)
        try:
            missing, reports = _get(ray, actors[0].open.remote())
            for modality, num_items in missing.items():
                progress.start(_step_name(modality), sum(num_items.values()), noun(modality))
                reports += _encode_on_actors(ray, actors, modality, num_items, progress)
                progress.finish()
            return _merge_reports(reports)
        finally:
            for actor in actors:
                ray.kill(actor)


class _Actor:
    """A worker in a Ray process. It opens its encoders on first use, so that errors reach the caller."""

    def __init__(self, job: ExtractJob, device: str, threads: int) -> None:
        self._job, self._device, self._threads = job, device, threads
        self._opened: Worker | None = None

    def open(self) -> tuple[dict[Modality, dict[int, int]], list[ShardReport]]:
        """Return modality -> chunk that lacks a feature -> its number of items, and a report per feature writer."""
        worker = self._worker()
        missing = {
            modality: {chunk: worker.cache.info.count_items(modality, [chunk]) for chunk in worker.missing(modality)}
            for modality in worker.writers
        }
        return missing, worker.empty_reports()

    def encode(self, modality: Modality, chunk: int) -> list[ShardReport]:
        return self._worker().encode(modality, [chunk], NullProgress())

    def _worker(self) -> Worker:
        if self._opened is None:
            import torch

            torch.set_num_threads(self._threads)  # Ray allows one thread per requested CPU
            self._opened = Worker(self._job, device=self._device)
        return self._opened


def _start_actors(ray: Any, job: ExtractJob) -> Sequence[Any]:
    num_gpus, num_nodes, num_actors = _num_gpus(ray), _num_nodes(ray), _count_actors(ray, job.settings)
    kind = ray.remote(
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
    )(_Actor)
    threads = max(1, num_cores() // ceil(num_actors / num_nodes))
    return [kind.remote(job, "cuda" if num_gpus else "cpu", threads) for _ in range(num_actors)]


def _count_actors(ray: Any, settings: ExtractSettings) -> int:
    return settings.actors or _num_gpus(ray) or _num_nodes(ray)


def _num_gpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _num_nodes(ray: Any) -> int:
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return max(1, len(nodes))


def _encode_on_actors(
    ray: Any, actors: Sequence[Any], modality: Modality, num_items: Mapping[int, int], progress: Progress
) -> Iterator[ShardReport]:
    waiting, idle, finished = deque(num_items), deque(actors), set[int]()
    running: dict[Any, tuple[Any, int]] = {}
    while len(finished) < len(num_items):
        while waiting and idle:
            actor, chunk = idle.popleft(), waiting.popleft()
            running[actor.encode.remote(modality, chunk)] = actor, chunk
        ready, _ = ray.wait(list(running), timeout=_RESULT_TIMEOUT_S)
        for task in ready:
            actor, chunk = running.pop(task)
            yield from _get(ray, task)
            idle.append(actor)
            if chunk not in finished:
                progress.advance(num_items[chunk])
            finished.add(chunk)
        if not ready and idle:
            waiting.extend(chunk for _, chunk in running.values() if chunk not in finished)


def _get(ray: Any, task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmbedcacheError):
            raise error.cause from None
        raise
