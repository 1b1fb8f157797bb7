"""A Ray cluster: actors hold the encoders, chunks are their tasks, and Ray runs again what a lost machine had."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from embedcache.encoders.base import Modality
from embedcache.errors import EmbedcacheError
from embedcache.extract.job import Done, Job, merge_done
from embedcache.extract.worker import Worker
from embedcache.processes import connected
from embedcache.progress import NullProgress, Progress
from embedcache.sources.base import Source

_PATIENCE_S = 30.0
"""After so long without news, chunks of an actor that Ray cannot start again go to one that has nothing to do."""


def run(job: Job, source: Source, progress: Progress) -> list[Done]:
    """Encode all that is missing, on a cluster whose machines all see the cache and the source.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedcacheError: what went wrong in an actor, other than its machine being lost.
    """
    del source  # every actor opens its own
    with connected(job.settings.address) as ray:
        actors = _start_actors(ray, job)
        try:
            missing: dict[Modality, dict[int, int]] = _get(ray, actors[0].missing.remote())
            parts = []
            for modality, num_items in missing.items():
                progress.start(f"encoding {modality}s", sum(num_items.values()), f"{modality}s")
                parts += list(_encode(ray, actors, modality, num_items, progress))
                progress.finish()
            return merge_done([_get(ray, actors[0].nothing_done.remote()), *parts])
        finally:
            for actor in actors:
                ray.kill(actor)


class _Actor:
    """A worker in a process of Ray. It opens its encoders when they are first needed, so that errors come back."""

    def __init__(self, job: Job, device: str, num_threads: int) -> None:
        self._job, self._device, self._num_threads = job, device, num_threads
        self._opened: Worker | None = None

    def missing(self) -> dict[Modality, dict[int, int]]:
        """Give modality -> chunk that misses a feature -> its number of items."""
        worker = self._worker()
        return {
            modality: {chunk: worker.count_items(modality, [chunk]) for chunk in worker.missing(modality)}
            for modality in worker.targets
        }

    def encode(self, modality: Modality, chunk: int) -> list[Done]:
        return self._worker().encode(modality, [chunk], NullProgress())

    def nothing_done(self) -> list[Done]:
        return self._worker().done({})

    def _worker(self) -> Worker:
        if self._opened is None:
            import torch

            torch.set_num_threads(self._num_threads)  # Ray allows one thread a CPU asked for
            self._opened = Worker(self._job, device=self._device)
        return self._opened


def _start_actors(ray: Any, job: Job) -> Sequence[Any]:
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_actors = job.settings.num_actors or num_gpus or max(1, len(nodes))
    kind = ray.remote(
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
    )(_Actor)
    threads = max(1, (os.cpu_count() or 1) // ceil(num_actors / max(1, len(nodes))))
    return [kind.remote(job, "cuda" if num_gpus else "cpu", threads) for _ in range(num_actors)]


def _encode(
    ray: Any, actors: Sequence[Any], modality: Modality, num_items: Mapping[int, int], progress: Progress
) -> Iterator[list[Done]]:
    waiting, idle, finished = deque(num_items), deque(actors), set[int]()
    running: dict[Any, tuple[Any, int]] = {}
    while len(finished) < len(num_items):
        while waiting and idle:
            actor, chunk = idle.popleft(), waiting.popleft()
            running[actor.encode.remote(modality, chunk)] = actor, chunk
        ready, _ = ray.wait(list(running), timeout=_PATIENCE_S)
        for task in ready:
            actor, chunk = running.pop(task)
            yield _get(ray, task)
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
