"""FAISS behind one door: an index whose ids are rows of a cache, and exact search."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.files import replacing
from embedcache.registry import require

_TRAINING_A_LIST = 50
_LEAST_TRAINING = 20_000
_MAPPED_SHARE = 0.5
_OWNS = True  # FAISS takes no names


class RowIndex:
    """An inner-product index over vectors of length 1. In FAISS's terms an `IndexIDMap` whose ids are our rows.

    Args:
        wrapped: the `IndexIDMap`.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self._faiss = import_faiss()
        self._inner = self._faiss.downcast_index(wrapped.index)
        self._rows: Ints | None = None

    def __len__(self) -> int:
        return int(self.wrapped.ntotal)

    @property
    def rows(self) -> Ints:
        """Rows in the order they were added: (N,)."""
        if self._rows is None:
            self._rows = np.asarray(self._faiss.vector_to_array(self.wrapped.id_map), np.int64)
        return self._rows

    @property
    def num_lists(self) -> int:
        """Lists of an inverted file, which a query looks into some of; 0 where there are none."""
        lists = self._faiss.try_extract_index_ivf(self._inner)
        return 0 if lists is None else int(lists.nlist)

    @property
    def is_graph(self) -> bool:
        """Whether it is searched from neighbor to neighbor."""
        return isinstance(self._inner, self._faiss.IndexHNSW)

    @property
    def is_refined(self) -> bool:
        """Whether finer codes put the best in order."""
        return isinstance(self._inner, self._faiss.IndexRefine)

    @property
    def is_exact(self) -> bool:
        """Whether a search compares with every vector, in float32."""
        return isinstance(self._inner, self._faiss.IndexFlat)

    @property
    def code_size(self) -> int:
        """Bytes of a vector in the lists of an inverted file."""
        return int(self._faiss.extract_index_ivf(self._inner).code_size)

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return bool(self._inner.is_trained)

    @property
    def num_training(self) -> int:
        """Vectors that it is trained on, where there are as many; 0 for kinds that need none."""
        needs_none = isinstance(self._inner, self._faiss.IndexFlat | self._faiss.IndexHNSWFlat)
        return 0 if needs_none else max(_LEAST_TRAINING, _TRAINING_A_LIST * self.num_lists)

    def train(self, vectors_SP: Floats) -> None:
        """Train on a sample; k-means of an inverted file runs on the GPUs where FAISS has them.

        Raises:
            SettingError: FAISS cannot train it on this little.
        """
        lists = self._faiss.try_extract_index_ivf(self._inner)
        if lists is not None and num_gpus():
            lists.clustering_index = self._faiss.index_cpu_to_all_gpus(self._faiss.IndexFlatIP(lists.d))
        try:
            self.wrapped.train(vectors_SP)
        except RuntimeError as error:
            raise SettingError(f"FAISS cannot train the index: {_reason(error)}; try --factory Flat") from error

    def add(self, rows_B: Ints, vectors_BP: Floats) -> None:
        """Add vectors of length 1."""
        self.wrapped.add_with_ids(np.ascontiguousarray(vectors_BP), rows_B)
        self._rows = None

    def add_part(self, rows_B: Ints, vectors_BP: Floats, first: int) -> None:
        """Add vectors to a part of an inverted file that is merged later: the first is the `first` of the whole."""
        self._inner.add_with_ids(np.ascontiguousarray(vectors_BP), first + np.arange(len(rows_B)))
        self._rows = np.concatenate([self.rows, rows_B])
        self._faiss.copy_array_to_vector(self._rows, self.wrapped.id_map)
        self.wrapped.ntotal = len(self._rows)

    def search(
        self, queries_QP: Floats, k: int, effort: Mapping[str, int], *, kept_N: Bools | None = None
    ) -> tuple[Floats, Ints]:
        """Get the k best rows of each query, best first: scores (Q, K) float32, rows (Q, K) int64 (-1: none found).

        Args:
            queries_QP: of length 1.
            k: K.
            effort: `nprobe`, `efSearch`, `k_factor`, where the kind of index has them.
            kept_N: which vectors may be found, in the order of `rows`; None is all.
        """
        selector = None
        if kept_N is not None:
            packed = np.packbits(kept_N, bitorder="little")
            selector = self._faiss.IDSelectorBitmap(packed)
        parameters = self._parameters(self._inner, effort, selector)
        scores, positions = self._inner.search(np.ascontiguousarray(queries_QP), k, params=parameters)
        return scores, np.where(positions < 0, -1, self.rows[positions])

    def _parameters(self, index: Any, effort: Mapping[str, int], selector: Any) -> Any:
        faiss, index = self._faiss, self._faiss.downcast_index(index)
        if isinstance(index, faiss.IndexPreTransform):
            inner = self._parameters(index.index, effort, selector)
            return faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexRefine):
            inner = self._parameters(index.base_index, effort, selector)
            return faiss.IndexRefineSearchParameters(k_factor=float(effort.get("k_factor", 1)), base_index_params=inner)
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=effort.get("nprobe", 1), **chosen)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=effort.get("efSearch", index.hnsw.efSearch), **chosen)
        return faiss.SearchParameters(**chosen) if chosen else None

    def latency_ms(self, queries_QP: Floats, k: int, effort: Mapping[str, int]) -> tuple[float, float]:
        """Measure milliseconds: the median of single queries, and a query of all in one batch."""
        self.search(queries_QP[:1], k, effort)  # the first one starts threads
        seconds = []
        for query in queries_QP:
            started = time.perf_counter()
            self.search(query[None], k, effort)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        self.search(queries_QP, k, effort)
        return 1000 * float(np.median(seconds)), 1000 * (time.perf_counter() - started) / len(queries_QP)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all; lists that are a file are found beside it again, wherever that is."""
        inverted = self._faiss.try_extract_index_ivf(self._inner)
        lists = None if inverted is None else self._faiss.downcast_InvertedLists(inverted.invlists)
        if isinstance(lists, self._faiss.OnDiskInvertedLists):
            lists.filename = Path(lists.filename).name
        with replacing(path) as temporary:
            self._faiss.write_index(self.wrapped, str(temporary))

    def emptied(self) -> "RowIndex":
        """Make an inverted file that is trained alike, and holds nothing; this one is of no use any more."""
        lists = self._faiss.extract_index_ivf(self._inner)
        empty = self._faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
        lists.replace_invlists(empty, _OWNS)
        empty.this.disown()
        lists.ntotal = self._inner.ntotal = self.wrapped.ntotal = 0
        self._faiss.copy_array_to_vector(np.empty(0, np.int64), self.wrapped.id_map)
        return RowIndex(self.wrapped)

    def merge_on_disk(self, parts: Sequence["RowIndex"], path: Path) -> "RowIndex":
        """Fill this inverted file, which is trained and empty, with those of others; its lists become a file."""
        faiss = self._faiss
        inverted = faiss.extract_index_ivf(self._inner)
        lists = faiss.OnDiskInvertedLists(inverted.nlist, inverted.code_size, str(path))
        every = faiss.InvertedListsPtrVector()
        for part in parts:
            every.push_back(faiss.extract_index_ivf(part.wrapped.index).invlists)
        with _no_output():
            total = lists.merge_from_multiple(every.data(), every.size())
        inverted.replace_invlists(lists, _OWNS)
        lists.this.disown()
        inverted.ntotal = self._inner.ntotal = self.wrapped.ntotal = total
        faiss.copy_array_to_vector(np.concatenate([part.rows for part in parts]), self.wrapped.id_map)
        return RowIndex(self.wrapped)

    def go_on(self) -> "RowIndex":
        """Draw a graph's random levels up to where it was, so that adding goes on as if it had never been read."""
        if self.is_graph:
            for _ in range(len(self)):
                self._inner.hnsw.random_level()
        return self


def make_index(factory: str, width: int) -> RowIndex:
    """Make an empty index.

    Raises:
        SettingError: FAISS does not know the factory string.
    """
    faiss = import_faiss()
    try:
        return RowIndex(faiss.IndexIDMap(faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)))
    except RuntimeError as error:
        raise SettingError(
            f"FAISS cannot make an index {factory!r} of width {width}: {_reason(error)}; try --factory Flat"
        ) from error


def read_index(path: Path, *, is_mapped: bool | None = None) -> RowIndex:
    """Read an index.

    Args:
        path: what `RowIndex.write` wrote.
        is_mapped: leave its vectors on the disk and let the system keep in memory what is asked for; None does so where
            the file is larger than half of the machine's memory. Such an index is only for searching.

    Raises:
        PathError: there is none.
        CorruptError: FAISS cannot read it.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; make an index with: embedcache curate index CACHE {path.parent}")
    if is_mapped is None:
        is_mapped = path.stat().st_size > _MAPPED_SHARE * _machine_bytes()
    faiss = import_faiss()
    try:
        if not is_mapped:
            with _no_output():
                return RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY))
        index = RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        return index if not index.num_lists else RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP))
    except (RuntimeError, AttributeError) as error:
        raise CorruptError(f"{path} is no FAISS index of rows: {_reason(error)}") from error


def exact_search(queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], k: int) -> tuple[Floats, Ints]:
    """Get the true k best of each query, best first, by going through all vectors: scores and rows, (Q, K).

    K is smaller where there are fewer vectors. Memory: a block.
    """
    scores_QK, rows_QK = np.empty((len(queries_QP), 0), np.float32), np.empty((len(queries_QP), 0), np.int64)
    for rows_B, vectors_BP in blocks:
        if len(rows_B):
            found_scores, positions = _nearest(queries_QP, vectors_BP, min(k, len(rows_B)))
            scores_QK = np.concatenate([scores_QK, found_scores], axis=1)
            rows_QK = np.concatenate([rows_QK, rows_B[positions]], axis=1)
            order = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]
            scores_QK = np.take_along_axis(scores_QK, order, axis=1)
            rows_QK = np.take_along_axis(rows_QK, order, axis=1)
    return scores_QK, rows_QK


def _nearest(queries_QP: Floats, vectors_BP: Floats, k: int) -> tuple[Floats, Ints]:
    faiss = import_faiss()
    queries_QP, vectors_BP = np.ascontiguousarray(queries_QP), np.ascontiguousarray(vectors_BP)
    if num_gpus() and k <= 2048:  # what FAISS's GPU search keeps at most
        resources = faiss.StandardGpuResources()
        scores, rows = faiss.knn_gpu(resources, queries_QP, vectors_BP, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        scores, rows = faiss.knn(queries_QP, vectors_BP, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def num_gpus() -> int:
    """Count the GPUs that FAISS can use: 0 with faiss-cpu."""
    return int(getattr(import_faiss(), "get_num_gpus", lambda: 0)())


def spherical_kmeans(vectors_NP: Floats, num_clusters: int, *, seed: int, iterations: int, most_each: int) -> Floats:
    """Cluster vectors by cosine: (K, P) float32 centroids.

    Args:
        vectors_NP: (N, P) float32 rows of length 1, at least K.
        num_clusters: K.
        seed: of the first centroids.
        iterations: of Lloyd's algorithm.
        most_each: vectors a cluster that are looked at, drawn where there are more.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    kmeans = import_faiss().Kmeans(
        vectors_NP.shape[1],
        num_clusters,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=most_each,
    )
    kmeans.train(np.ascontiguousarray(vectors_NP))
    centroids_KP: Floats = kmeans.centroids
    return centroids_KP


def import_faiss() -> Any:
    """Import faiss.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("faiss", extra="cpu")


@contextmanager
def _no_output() -> Iterator[None]:
    """Silence what FAISS prints about files of lists, which no setting of its does."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[-1].rpartition("failed: ")[2]
