"""Unit vectors of one cached feature, plain or projected by a run, and passes over all of them.

A pass is a pure function of one chunk and an associative merge of partial results. Partial results are merged in the
order of the chunks, so that any number of workers computes the same bits, on this machine or on a Ray cluster.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Bools, Floats, Inputs, Ints, blocks, normalize
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.pairs import ANY_LANGUAGE, is_language
from embedcache.devices import AUTO, announce_device, torch_device
from embedcache.errors import DataError, SettingError, quoted
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.processes import connected, num_cores
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.saved import PairConfig, check_feature, load_pair, project, read_config
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.projectors.pair import AlignedPair

_BLOCK = 256
_READ_ROWS = 65_536
_READING = "reading vectors"


class Vectors:
    """All valid items of a complete feature as float32 rows of length 1. Pickling keeps the arguments and opens again.

    Args:
        cache_path: path or URL of the cache.
        modality: modality of the items.
        feature: `encoder/feature`; None: the run's feature, or the only one of the modality.
        run_path: run that projects the feature; None: the plain feature.
        language: of texts, only those in this language; None or `any`: all.
        width: the first components to keep, scaled to length 1 again; None: all.
        device: torch device that projects.
        on_demand: the feature is known to be complete, as it was indexed: open nothing but the commits and weights
            that `read` needs, when it needs them.

    Raises:
        SettingError: the width is larger than that of the space.
        UnknownNameError: no feature or several features have that name, or no text is in that language.
        UnfinishedError: chunks of the feature are missing.
        FingerprintError: the run was trained on another encoder's features.
        DataError: the plain feature has several vectors per item, or no item is valid.
    """

    def __init__(
        self,
        cache_path: AnyPath,
        modality: str,
        feature: str | None = None,
        run_path: AnyPath | None = None,
        language: str | None = None,
        width: int | None = None,
        device: str = AUTO,
        *,
        on_demand: bool = False,
    ) -> None:
        self._device = device
        self._language = None if language == ANY_LANGUAGE or modality != "text" else language
        self.cache = Cache(cache_path)
        run = None if run_path is None else os.fspath(run_path)
        self._arguments = (str(self.cache.path), modality, feature, run, language, width, device)
        self.run_path = None if run is None else Path(run)
        self.config = None if self.run_path is None else read_config(self.run_path)
        self._pair: AlignedPair | None = None
        if not on_demand:
            self._load_pair()
        self.feature = _open(self.cache, modality, feature, self.config, on_demand=on_demand)
        self.full_width = self.feature.width if self.config is None else self.config.shared_width
        if width is not None and width > self.full_width:
            raise SettingError(f"width: expected at most {self.full_width}, the width of the space, got {width}")
        self.width = width or self.full_width

    def _load_pair(self) -> "AlignedPair | None":
        if self._pair is None and self.run_path is not None:
            self._pair, self.config = load_pair(self.run_path, device=self.device)
        return self._pair

    @cached_property
    def device(self) -> str:
        """Torch device that projects; without a run, the device that was asked for."""
        return self._device if self.run_path is None else str(torch_device(self._device))

    def __reduce__(self) -> tuple[Any, ...]:
        return Vectors, self._arguments

    @property
    def modality(self) -> str:
        """Modality of the items."""
        return self.feature.modality

    @property
    def other_modality(self) -> str | None:
        """The other modality of the run; None without a run."""
        return None if self.config is None else self.config.other_modality(self.modality)

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the feature."""
        return self.cache.info.num_chunks(self.modality)

    @cached_property
    def rows(self) -> Ints:
        """Rows of the valid items, ascending: (N,)."""
        rows = np.flatnonzero(self.feature.valid)
        return rows if self._in_language is None else rows[self._in_language[rows]]

    @cached_property
    def _in_language(self) -> Bools | None:
        return None if self._language is None else is_language([self.cache], self._language)

    def has(self, rows: Ints) -> Bools:
        """Return whether each item is valid, (B,) bool; see `Feature.has`."""
        has_B = self.feature.has(rows)
        if self._in_language is not None:
            has_B[has_B] = self._in_language[rows[has_B]]
        return has_B

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk and verify its checksums: rows (B,) and vectors (B, P); both are empty if all items failed."""
        rows, inputs = self.feature.chunk(number)
        if self._in_language is not None:
            kept = np.flatnonzero(self._in_language[rows])
            rows, inputs = rows[kept], inputs.take(kept)
        return rows, self._unit(inputs)

    def blocks(self, title: str = "", progress: Progress | None = None) -> Iterator[tuple[Ints, Floats]]:
        """Iterate over all chunks in order, as one step of `progress`."""
        progress = progress or NullProgress()
        progress.start(title, len(self.rows), noun(self.modality))
        for number in range(self.num_chunks):
            rows_B, vectors_BP = self.chunk(number)
            yield rows_B, vectors_BP
            progress.advance(len(rows_B))
        progress.finish()

    def read(self, rows: Ints, progress: Progress | None = None) -> Floats:
        """Read rows in the given order, as one step of `progress`: (B, P).

        Raises `DataError` if a row is out of range or failed.
        """
        if progress is None:
            return self._unit(self.feature.read(rows))
        progress.start(_READING, len(rows), noun(self.modality))
        unit_BP = np.empty((len(rows), self.width), np.float32)
        at_once = len(rows) if self.feature.has_tokens else _READ_ROWS  # tokens are padded to the longest of a block
        for block in blocks(len(rows), max(1, at_once)):
            unit_BP[block] = self._unit(self.feature.read(rows[block]), progress)
        progress.finish()
        return unit_BP

    def sample(self, size: int, *, seed: int = 0, progress: Progress | None = None) -> Floats:
        """Read a random sample of items, or all items if there are no more: (S, P)."""
        return self.read(np.sort(np.random.default_rng(seed).permutation(self.rows)[:size]), progress)

    def _unit(self, inputs: Inputs, progress: Progress | None = None) -> Floats:
        pair, progress = self._load_pair(), progress or NullProgress()
        if pair is not None:
            tower = pair.tower(self.modality)
            return project(tower, inputs, width=self.width, device=self.device, progress=progress)
        unit_BD = _normalize_blocks(inputs.values[:, : self.width])
        progress.advance(len(unit_BD))
        return unit_BD


def _normalize_blocks(values_BD: Array) -> Floats:
    """Normalize a few rows at a time; whole chunks would take new memory from the system for each step."""
    unit_BD = np.empty(values_BD.shape, np.float32)
    for block in blocks(len(values_BD), _BLOCK):
        unit_BD[block] = normalize(values_BD[block])
    return unit_BD


def _open(cache: Cache, modality: str, name: str | None, config: PairConfig | None, *, on_demand: bool) -> InputFeature:
    if name is None and config is not None:
        name = config.tower_input(modality).feature
    feature = open_input(cache, modality, name)
    if not on_demand:
        feature.require_complete()
    if config is not None:
        check_feature(config, modality, feature.name, feature.fingerprint)
    elif feature.has_tokens:
        raise DataError(
            f"feature {feature.name}: expected one vector per item, got several; choose a vector feature, or a run "
            "that projects it"
        )
    if not on_demand and not feature.valid.any():
        raise DataError(
            f"feature {feature.name}: expected encoded items, got none; see: embedcache inspect {quoted(cache.path)}"
        )
    return feature


State = TypeVar("State")

_TASKS_PER_CORE = 2  # one running, one waiting


class ChunkPass(Protocol[State]):
    """The computation of a pass on each chunk. It is pickled for other processes."""

    def process(self, rows_B: Ints, vectors_BP: Floats) -> State:
        """Compute the partial result of one chunk, which may be empty."""
        ...

    def merge(self, before: State, after: State) -> State:
        """Merge the results of two neighboring ranges of chunks.

        May change and return the first, but must not write into its arrays: those that come from Ray are read-only.
        """
        ...


def run_pass(
    vectors: Vectors,
    chunk_pass: ChunkPass[State],
    *,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    title: str = _READING,
    progress: Progress | None = None,
) -> State:
    """Run a pass over all chunks, one chunk per core at a time.

    With the engine `ray`, all machines must see the cache and the run; without an address, the connected cluster is
    used, or a new one on this machine. Memory: per core, a chunk, what the pass needs for it, and two partial results.
    With Ray the chunks are in its workers, the partial results here.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedcacheError: no Ray cluster answers at the address.
    """
    progress = progress or NullProgress()
    progress.start(title, len(vectors.rows), noun(vectors.modality))
    results = _run_local(vectors, chunk_pass) if engine == "local" else _run_on_ray(vectors, chunk_pass, address)
    state: State | None = None
    for count, result in results:
        state = result if state is None else chunk_pass.merge(state, result)
        progress.advance(count)
    progress.finish()
    assert state is not None  # a complete feature has a chunk
    return state


def _run_local(vectors: Vectors, chunk_pass: ChunkPass[State]) -> Iterator[tuple[int, State]]:
    """Run one chunk per core; BLAS uses one thread per product."""
    announce_device("cpu")
    cores = num_cores()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores, "pass") as pool:
        yield from _in_order(
            lambda chunk: pool.submit(_process, vectors, chunk_pass, chunk), Future.result, vectors.num_chunks, cores
        )


def _process(vectors: Vectors, chunk_pass: ChunkPass[State], chunk: int) -> tuple[int, State]:
    rows_B, vectors_BP = vectors.chunk(chunk)
    return len(rows_B), chunk_pass.process(rows_B, vectors_BP)


def _run_on_ray(vectors: Vectors, chunk_pass: ChunkPass[State], address: str | None) -> Iterator[tuple[int, State]]:
    """Run the chunks as Ray tasks; Ray repeats a task whose machine is lost."""
    with connected(address) as ray:
        shared = ray.put(vectors), ray.put(chunk_pass)
        task = ray.remote(num_cpus=1, max_retries=-1)(_process)
        cores = int(ray.cluster_resources().get("CPU", 1))
        yield from _in_order(lambda chunk: task.remote(*shared, chunk), ray.get, vectors.num_chunks, cores)


def _in_order(start: Callable[[int], Any], wait: Callable[[Any], Any], num_chunks: int, cores: int) -> Iterator[Any]:
    running: deque[Any] = deque()
    for chunk in range(num_chunks):
        running.append(start(chunk))
        if len(running) > _TASKS_PER_CORE * cores:
            yield wait(running.popleft())
    while running:
        yield wait(running.popleft())
