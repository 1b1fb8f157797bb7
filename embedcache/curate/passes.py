"""One pass over the chunks of a feature, on this machine or on a Ray cluster, merged in the order of the chunks.

A pass is a pure function of a chunk and an associative merge of what it gives. Partial results are merged strictly in
the order of the chunks, so that any number of workers gives the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from threadpoolctl import threadpool_limits

from embedcache.arrays import Floats, Ints
from embedcache.cores import num_cores
from embedcache.curate.vectors import Vectors
from embedcache.progress import Progress, Silent
from embedcache.ray_cluster import connected

Engine: TypeAlias = Literal["local", "ray"]
State = TypeVar("State")

_AHEAD = 2
"""Tasks a core: one in work, one waiting."""


class Pass(Protocol[State]):
    """What is done with each chunk. It is pickled where another process works."""

    def take(self, rows_B: Ints, vectors_BP: Floats) -> State:
        """Make a partial result of one chunk, which may be empty."""
        ...

    def merge(self, before: State, after: State) -> State:
        """Join the results of two neighbouring ranges of chunks.

        May change and return the first, but no array in place: those that come from Ray are read-only.
        """
        ...


def run_pass(
    vectors: Vectors,
    work: Pass[State],
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
    progress = progress or Silent()
    progress.start(what, len(vectors.rows), f"{vectors.modality}s")
    parts = _local(vectors, work) if engine == "local" else _on_ray(vectors, work, address)
    state: State | None = None
    for count, part in parts:
        state = part if state is None else work.merge(state, part)
        progress.advance(count)
    progress.finish()
    assert state is not None  # a finished feature has a chunk
    return state


def _local(vectors: Vectors, work: Pass[State]) -> Iterator[tuple[int, State]]:
    """Give each core a chunk; a product takes one core then, as reading, comparing and counting do."""
    cores = num_cores()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores, "pass") as pool:
        yield from _in_order(
            lambda chunk: pool.submit(_take, vectors, work, chunk), Future.result, vectors.num_chunks, cores
        )


def _take(vectors: Vectors, work: Pass[State], chunk: int) -> tuple[int, State]:
    rows_B, vectors_BP = vectors.chunk(chunk)
    return len(rows_B), work.take(rows_B, vectors_BP)


def _on_ray(vectors: Vectors, work: Pass[State], address: str | None) -> Iterator[tuple[int, State]]:
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
