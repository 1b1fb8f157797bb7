"""Find exact nearest neighbors by dot product, and scan stored vectors in threads or Ray tasks.

For rows of length 1 the product is the cosine. Ties go to the lower row. A scan applies a pure function to each chunk.
Its results come in the order of the chunks, so that any number of workers computes the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Bools, Floats, Ints, Products, blocks, dot_products, from_sort_keys, to_sort_keys
from embedcache.processes import announce_device, connected, num_cores
from embedcache.progress import NullProgress, Progress

_TILE = 1024  # queries per tile
_CANDIDATES = 4096  # candidates per tile: 16 MB of similarities, which stay in the cache of many processors
_FEW = 4  # candidates per neighbor, up to which sorting them is faster than finding the best by partition
Result = TypeVar("Result")
Compute: TypeAlias = Callable[[Ints, Floats], Result]
"""Function of the rows and the vectors of a chunk."""

_TASKS_PER_CORE = 2  # one running, one waiting


class KBest:
    """The K best candidates of each of N rows, which may come in any order.

    If scores are equal, the lower number is better. A score of -inf means that there is no candidate. Memory: 8 K bytes
    per row, and a few copies of the added candidates.

    Args:
        num_rows: N.
        k: K, at least 1.
        num_candidates: the largest candidate number plus 1. Needed if a candidate may come twice to a row.

    Attributes:
        numbers: (N, K) int32, best first, -1 in place of missing candidates.
        scores: (N, K) float32, -inf in place of missing candidates.

    Example:
        >>> best = KBest(num_rows=1, k=2)
        >>> best.add(np.array([0, 0, 0]), np.array([7, 8, 9]), np.float32([0.1, 0.9, 0.5]))
        >>> best.numbers.tolist()
        [[8, 9]]
    """

    def __init__(self, num_rows: int, k: int, num_candidates: int | None = None) -> None:
        self.numbers: Array = np.full((num_rows, k), -1, np.int32)
        self.scores: Floats = np.full((num_rows, k), -np.inf, np.float32)
        # The column of each candidate in a block; the last entry is that of number -1.
        self._columns: Array | None = None if num_candidates is None else np.full(num_candidates + 1, -1, np.int32)

    def add(self, rows_M: Ints, numbers_M: Ints, scores_M: Floats) -> None:
        """Add candidates of some rows. Each candidate of a row comes only once."""
        candidates = np.flatnonzero(scores_M >= self.scores[rows_M, -1])
        candidates = candidates[np.argsort(rows_M[candidates], kind="stable")]
        rows_U, place_M = np.unique(rows_M[candidates], return_inverse=True)
        self._merge(rows_U, place_M, numbers_M[candidates].astype(np.int64), scores_M[candidates])

    def add_block(self, rows_B: Ints, numbers_C: Ints, scores_BC: Floats) -> None:
        """Add R candidates of each of B different rows."""
        changed = np.flatnonzero(scores_BC.max(axis=1, initial=-np.inf) >= self.scores[rows_B, -1])
        rows_U = rows_B[changed]
        scores_UC = np.ascontiguousarray(scores_BC[changed])
        if self._columns is not None:
            self._leave_out_listed(self._columns, rows_U, numbers_C, scores_UC)

        # Flat positions are cheaper to find than rows and columns.
        flat = np.flatnonzero(self._is_candidate(rows_U, scores_UC))
        place_M = flat // len(numbers_C)
        column_M = flat - place_M * len(numbers_C)
        self._merge(rows_U, place_M, numbers_C[column_M], scores_UC.ravel()[flat])

    def _leave_out_listed(self, columns: Array, rows_U: Ints, numbers_C: Ints, scores_UC: Floats) -> None:
        """Set the scores of candidates that are already listed to -inf."""
        columns[numbers_C] = np.arange(len(numbers_C))
        columns_UK = columns[self.numbers[rows_U]]
        columns[numbers_C] = -1
        row, listed = np.nonzero(columns_UK >= 0)
        scores_UC[row, columns_UK[row, listed]] = -np.inf

    def _is_candidate(self, rows_U: Ints, scores_UC: Floats) -> Bools:
        """Return whether each candidate may be among the K best. If a row has many, only its best K may be."""
        k = self.scores.shape[1]
        is_candidate_UC: Bools = scores_UC >= self.scores[rows_U, -1:]
        many = np.flatnonzero(np.count_nonzero(is_candidate_UC, axis=1) > _FEW * k)
        if len(many):
            lowest_M = scores_UC[many].max(axis=1) if k == 1 else np.partition(scores_UC[many], -k, axis=1)[:, -k]
            is_candidate_UC[many] = scores_UC[many] >= lowest_M[:, None]
        return is_candidate_UC

    def _merge(self, rows_U: Ints, place_M: Ints, numbers_M: Ints, scores_M: Floats) -> None:
        """Sort candidates into the lists of some rows. `place_M` is the place of each one's row, ascending.

        The list of a row and its candidates form a row of sort keys. The K largest keys are kept.
        """
        if not len(place_M):
            return

        k = self.scores.shape[1]
        counts_U = np.bincount(place_M, minlength=len(rows_U))
        column_M = k + np.arange(len(place_M)) - (np.cumsum(counts_U) - counts_U)[place_M]
        keys = np.full((len(rows_U), k + int(counts_U.max())), np.iinfo(np.int64).min)
        keys[:, :k] = to_sort_keys(self.scores[rows_U], self.numbers[rows_U].view(np.uint32))  # -1 is the highest
        keys[place_M, column_M] = to_sort_keys(scores_M, numbers_M)
        keys.sort(axis=1)

        scores_UK, numbers_UK = from_sort_keys(keys[:, : -k - 1 : -1])
        self.scores[rows_U] = scores_UK
        self.numbers[rows_U] = np.where(np.isneginf(scores_UK), -1, numbers_UK)


def knn(
    queries_QP: Floats,
    candidates: Floats | Iterable[Floats],
    k: int,
    *,
    own: Ints | None = None,
    groups: tuple[Ints, Ints] | None = None,
    products: Products = dot_products,
) -> tuple[Ints, Floats]:
    """Find the k candidates with the largest dot product.

    Memory: the inputs, four times the products of 1,024 queries with 4,096 candidates or a block, and the result.

    Args:
        queries_QP: vectors of the queries.
        candidates: (C, P) rows, or an iterable of blocks of them, whose rows are counted across blocks.
        k: number of candidates per query.
        own: (Q,) candidate that is the query itself, and so not its neighbor.
        groups: (Q,) and (C,) groups of queries and candidates. A candidate of the query's group is not a neighbor.
        products: computes dot products, perhaps on a GPU.

    Returns:
        (Q, K) int64 rows of candidates, best first, and (Q, K) float32 similarities. If there are fewer than K
        candidates, the last rows are -1 and their similarities -inf.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> knn(eye[:1], 2 * eye + eye[[1, 2, 0]], 2)[0].tolist()
        [[0, 2]]
    """
    best = KBest(len(queries_QP), k)
    start = 0
    for block_CP in _divide(candidates) if k else ():
        numbers = np.arange(start, start + len(block_CP))
        for tile in blocks(len(queries_QP), _TILE):
            sims_BC = products(queries_QP[tile], block_CP)

            # A candidate of similarity -inf is never a neighbor.
            if own is not None:
                here = np.flatnonzero((own[tile] >= start) & (own[tile] < start + len(block_CP)))
                sims_BC[here, own[tile][here] - start] = -np.inf
            if groups is not None:
                sims_BC[groups[0][tile, None] == groups[1][numbers]] = -np.inf

            best.add_block(np.arange(tile.start, tile.stop), numbers, sims_BC)
        start += len(block_CP)
    return best.numbers.astype(np.int64), best.scores


def _divide(candidates: Floats | Iterable[Floats]) -> Iterator[Floats]:
    if not isinstance(candidates, np.ndarray):
        yield from candidates
        return
    for block in blocks(len(candidates), _CANDIDATES):
        yield candidates[block]


def knn_of_blocks(
    queries_QP: Floats, candidates: Iterable[tuple[Ints, Floats]], k: int, *, products: Products = dot_products
) -> tuple[Ints, Floats]:
    """Find the k candidates with the largest dot product, given blocks of the rows and vectors of candidates.

    Rows ascend within and across blocks. The result equals `knn` with these rows, but has fewer columns if there are
    fewer candidates. Memory: as in `knn`, and 8 bytes per candidate.
    """
    rows: list[Ints] = [np.empty(0, np.int64)]

    def vectors() -> Iterator[Floats]:
        for rows_B, vectors_BP in candidates:
            rows.append(rows_B)
            yield vectors_BP

    places_QK, sims_QK = knn(queries_QP, vectors(), k, products=products)
    rows_N = np.concatenate(rows)
    return rows_N[places_QK[:, : len(rows_N)]], sims_QK[:, : len(rows_N)]


class StoredVectors(Protocol):
    """Vectors of length 1 of N rows, which are read in chunks. Several threads and processes may read."""

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
        """Name of the rows, such as `images`."""
        ...

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk: rows (B,) and vectors (B, P). Rows ascend, also across chunks. Both may be empty."""
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

    With the engine `ray`, all machines must see the cache and the run. Without an address, the connected cluster is
    used, or a new one on this machine. Memory per core: a chunk, the memory of the function, and two results. With Ray,
    chunks are in the memory of its workers and results in ours, as read-only arrays.

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
    """Compute one chunk per core. BLAS uses one thread per product."""
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
    """Compute the chunks as Ray tasks. Ray repeats a task whose machine is lost."""
    with connected(address) as ray:
        shared = (ray.put(vectors), ray.put(compute))
        task = ray.remote(num_cpus=1, max_retries=-1)(_process)
        cores = int(ray.cluster_resources().get("CPU", 1))
        yield from _in_order(lambda chunk: task.remote(*shared, chunk), ray.get, vectors.num_chunks, cores)


def _in_order(start: Callable[[int], Any], wait: Callable[[Any], Any], num_chunks: int, cores: int) -> Iterator[Any]:
    # A few tasks beyond the running ones keep the cores busy, without all results waiting in memory.
    running: deque[Any] = deque()
    for chunk in range(num_chunks):
        running.append(start(chunk))
        if len(running) > _TASKS_PER_CORE * cores:
            yield wait(running.popleft())
    while running:
        yield wait(running.popleft())
