"""One pass over stored vectors: threads on this machine, or tasks on a Ray cluster.

A pass is a pure function of one chunk. Its results come in the order of the chunks, so that any number of workers
computes the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from threadpoolctl import threadpool_limits

from embedcache.arrays import Floats, Ints
from embedcache.processes import announce_device, connected, num_cores
from embedcache.progress import NullProgress, Progress

Result = TypeVar("Result")
Compute: TypeAlias = Callable[[Ints, Floats], Result]
"""Function of the rows and the vectors of a chunk."""

_TASKS_PER_CORE = 2  # one running, one waiting


class StoredVectors(Protocol):
    """Vectors of length 1 of N rows, which are read in chunks. Several threads may read, and other processes."""

    @property
    def rows(self) -> Ints:
        """Rows that have a vector, ascending: (N,)."""
        ...

    @property
    def width(self) -> int:
        """Width of the vectors."""
        ...

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        ...

    @property
    def unit(self) -> str:
        """What the rows are, such as `images`."""
        ...

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk: rows (B,), ascending also from chunk to chunk, and vectors (B, P). Both may be empty."""
        ...

    def read(self, rows: Ints) -> Floats:
        """Read rows in the given order: (B, P)."""
        ...


def scan(
    vectors: StoredVectors,
    compute: Compute[Result],
    *,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    title: str = "reading vectors",
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Iterate over the results of a function of the rows and vectors of each chunk, one chunk per core at a time.

    With the engine `ray`, all machines must see the cache and the run; without an address, the connected cluster is
    used, or a new one on this machine. Memory: per core, a chunk, what the function needs for it, and two results. With
    Ray the chunks are in its workers, the results here, in arrays that must not be written into.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedcacheError: no Ray cluster answers at the address.
    """
    progress = progress or NullProgress()
    progress.start(title, len(vectors.rows), vectors.unit)
    results = _scan_here(vectors, compute) if engine == "local" else _scan_on_ray(vectors, compute, address)
    for count, result in results:
        yield result
        progress.advance(count)
    progress.finish()


def _scan_here(vectors: StoredVectors, compute: Compute[Result]) -> Iterator[tuple[int, Result]]:
    """Compute one chunk per core; BLAS uses one thread per product."""
    announce_device("cpu")
    cores = num_cores()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores, "scan") as pool:
        yield from _in_order(
            lambda chunk: pool.submit(_process, vectors, compute, chunk), Future.result, vectors.num_chunks, cores
        )


def _process(vectors: StoredVectors, compute: Compute[Result], chunk: int) -> tuple[int, Result]:
    rows_B, vectors_BP = vectors.chunk(chunk)
    return len(rows_B), compute(rows_B, vectors_BP)


def _scan_on_ray(vectors: StoredVectors, compute: Compute[Result], address: str | None) -> Iterator[tuple[int, Result]]:
    """Compute the chunks as Ray tasks; Ray repeats a task whose machine is lost."""
    with connected(address) as ray:
        shared = ray.put(vectors), ray.put(compute)
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
