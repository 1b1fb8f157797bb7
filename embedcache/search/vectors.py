"""Unit vectors of one feature of a cache, plain or projected by a run: what indexes and passes go through.

One pass over the chunks of a feature, on this machine or on a Ray cluster, merged in the order of the chunks.

A pass is a pure function of a chunk and an associative merge of what it gives. Partial results are merged strictly in
the order of the chunks, so that any number of workers gives the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Floats, Inputs, Ints, blocks, normalize
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.errors import DataError
from embedcache.processes import connected, num_cores
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, check_feature, load_pair, project
from embedcache.store.cache import Cache

_BLOCK = 256


class Vectors:
    """All valid items of a finished feature as float32 rows of length 1. Can be pickled: it opens again.

    Args:
        cache_path: the cache.
        modality: `image` or `text`.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        run_path: project the feature with this run; None takes the plain feature.

    Raises:
        UnknownNameError: no feature is named so, or the name fits several.
        UnfinishedError: the feature has missing chunks.
        FingerprintError: the run was trained on another encoder's features.
        DataError: the plain feature has several vectors an item, or there is no valid item.
    """

    def __init__(
        self,
        cache_path: Path | str,
        modality: str,
        feature: str | None = None,
        run_path: Path | str | None = None,
    ) -> None:
        self._asked = (str(cache_path), modality, feature, None if run_path is None else str(run_path))
        self.cache = Cache(cache_path)
        self.run_path = None if run_path is None else Path(run_path)
        self._pair: AlignedPair | None = None
        self.config: PairConfig | None = None
        if self.run_path is not None:
            self._pair, self.config = load_pair(self.run_path)
        self.side = _open(self.cache, modality, feature, self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return Vectors, self._asked

    @property
    def modality(self) -> str:
        """`image` or `text`."""
        return self.side.modality

    @property
    def num_chunks(self) -> int:
        """Chunks of the feature."""
        return self.cache.info.num_chunks(self.modality)

    @cached_property
    def rows(self) -> Ints:
        """The items' rows, ascending: (N,)."""
        return np.flatnonzero(self.side.valid)

    @cached_property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.read(self.rows[:1]).shape[1])

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk, checksums compared: rows (B,) and vectors (B, P); both empty where all items failed.

        Raises:
            CorruptError: bytes differ from their checksum.
        """
        rows, inputs = self.side.chunk(number)
        return rows, self._unit(inputs)

    def blocks(self) -> Iterator[tuple[Ints, Floats]]:
        """Go through all chunks in order."""
        for number in range(self.num_chunks):
            yield self.chunk(number)

    def read(self, rows: Ints) -> Floats:
        """Gather rows, in the order asked for: (B, P).

        Raises:
            DataError: a row is out of range or failed.
        """
        return self._unit(self.side.read(rows))

    def sample(self, size: int, *, seed: int = 0) -> Floats:
        """Draw rows at random, or take all where there are no more: (S, P)."""
        return self.read(np.sort(np.random.default_rng(seed).permutation(self.rows)[:size]))

    def _unit(self, inputs: Inputs) -> Floats:
        if self._pair is None:
            return _normalized(inputs.values)
        return project(self._pair.image if self.modality == "image" else self._pair.text, inputs)


def _normalized(values_BD: Array) -> Floats:
    """Do as `normalize`, some rows at a time: whole chunks would take new memory from the system for each step."""
    unit_BD = np.empty(values_BD.shape, np.float32)
    for block in blocks(len(values_BD), _BLOCK):
        unit_BD[block] = normalize(values_BD[block])
    return unit_BD


def _open(cache: Cache, modality: str, name: str | None, config: PairConfig | None) -> InputFeature:
    if name is None and config is not None:
        name = config.tower_input(modality).feature
    side = open_input(cache, modality, name)
    side.require_complete()
    if config is not None:
        check_feature(config, modality, side.name, side.fingerprint)
    elif side.has_tokens:
        raise DataError(
            f"feature {side.name} has several vectors an item; take a vector feature, or a run that takes it"
        )
    if not side.valid.any():
        raise DataError(f"feature {side.name} has no valid item")
    return side


Engine: TypeAlias = Literal["local", "ray"]
State = TypeVar("State")

_AHEAD = 2
"""Tasks a core: one in work, one waiting."""


class ChunkPass(Protocol[State]):
    """What is done with each chunk. It is pickled where another process works."""

    def take(self, rows_B: Ints, vectors_BP: Floats) -> State:
        """Make a partial result of one chunk, which may be empty."""
        ...

    def merge(self, before: State, after: State) -> State:
        """Join the results of two neighboring ranges of chunks.

        May change and return the first, but no array in place: those that come from Ray are read-only.
        """
        ...


def run_pass(
    vectors: Vectors,
    work: ChunkPass[State],
    *,
    engine: Engine = "local",
    address: str | None = None,
    what: str = "going through vectors",
    progress: Progress | None = None,
) -> State:
    """Go through all chunks once.

    Locally one process does it, with a thread and a chunk a core. Memory: a chunk and what is done with it for each
    core, and two partial results a core; with Ray alike in each of its workers, and these partial results here.

    Args:
        vectors: what to go through.
        work: what to do.
        engine: `local`, or `ray`, whose machines must all see the cache and the run.
        address: of a Ray cluster; None starts one here, or takes the one that is connected.
        what: for the progress.
        progress: told about items.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedcacheError: there is no Ray cluster at the address.
    """
    progress = progress or NullProgress()
    progress.start(what, len(vectors.rows), f"{vectors.modality}s")
    parts = _local(vectors, work) if engine == "local" else _on_ray(vectors, work, address)
    state: State | None = None
    for count, part in parts:
        state = part if state is None else work.merge(state, part)
        progress.advance(count)
    progress.finish()
    assert state is not None  # a finished feature has a chunk
    return state


def _local(vectors: Vectors, work: ChunkPass[State]) -> Iterator[tuple[int, State]]:
    """Give each core a chunk; a product takes one core then, as reading, comparing and counting do."""
    cores = num_cores()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores, "pass") as pool:
        yield from _in_order(
            lambda chunk: pool.submit(_take, vectors, work, chunk), Future.result, vectors.num_chunks, cores
        )


def _take(vectors: Vectors, work: ChunkPass[State], chunk: int) -> tuple[int, State]:
    rows_B, vectors_BP = vectors.chunk(chunk)
    return len(rows_B), work.take(rows_B, vectors_BP)


def _on_ray(vectors: Vectors, work: ChunkPass[State], address: str | None) -> Iterator[tuple[int, State]]:
    """Give the parts in the order of the chunks; a task whose machine is lost is run again by Ray."""
    with connected(address) as ray:
        shared = ray.put(vectors), ray.put(work)
        task = ray.remote(num_cpus=1, max_retries=-1)(_take)
        cores = int(ray.cluster_resources().get("CPU", 1))
        yield from _in_order(lambda chunk: task.remote(*shared, chunk), ray.get, vectors.num_chunks, cores)


def _in_order(start: Callable[[int], Any], wait: Callable[[Any], Any], num_chunks: int, cores: int) -> Iterator[Any]:
    running: deque[Any] = deque()
    for chunk in range(num_chunks):
        running.append(start(chunk))
        if len(running) > _AHEAD * cores:
            yield wait(running.popleft())
    while running:
        yield wait(running.popleft())
