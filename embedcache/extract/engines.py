"""Engines that run an extraction: the devices of this machine, or the actors of a Ray cluster.

In a cluster, actors hold the encoders and each chunk is a task; Ray repeats the tasks of a machine that was lost.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from embedcache.devices import AUTO, all_devices, announce_device
from embedcache.encoders.base import Modality
from embedcache.errors import EmbedcacheError, UnfinishedError
from embedcache.extract.settings import ExtractJob, ExtractSettings
from embedcache.extract.worker import ShardReport, Worker, merge_reports, step_name
from embedcache.files import open_path
from embedcache.locks import has_locks
from embedcache.modalities import noun
from embedcache.processes import connected, num_cores, run_processes
from embedcache.progress import NullProgress, Progress
from embedcache.sources.base import Source

_RESULT_TIMEOUT_S = 30.0
"""Time without a result after which the chunks of an actor that Ray cannot restart are given to an idle one."""


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
        steps=[step_name(modality) for modality in job.encoders],
        is_split=is_split,
    )
    if num_died and (is_split or not reports):
        raise UnfinishedError(
            f"{num_died} of {count} worker processes died; finished chunks are stored; run the same command again"
        )
    if num_died:
        progress.note(f"{num_died} of {count} worker processes died; the others finished their chunks")
    return merge_reports(report for process_reports in reports for report in process_reports)


def _run_device(task: tuple[ExtractJob, str, int], progress: Progress) -> list[ShardReport]:
    """Run in a worker process: encode on one device with a fixed number of threads."""
    import torch

    job, device, threads = task
    torch.set_num_threads(threads)  # also for encoders that stay on the CPU
    settings = replace(job.settings, threads=job.settings.threads or threads)
    return Worker(replace(job, settings=settings), device=device).run(progress)


def _run_ray(job: ExtractJob, _: Source, progress: Progress) -> list[ShardReport]:
    """Encode on a cluster whose machines all see the cache and the source; each actor opens its own source."""
    with connected(job.settings.address) as ray:
        actors = _start_actors(ray, job)
        try:
            missing, reports = _get(ray, actors[0].open.remote())
            for modality, num_items in missing.items():
                progress.start(step_name(modality), sum(num_items.values()), noun(modality))
                reports += _encode_on_actors(ray, actors, modality, num_items, progress)
                progress.finish()
            return merge_reports(reports)
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
