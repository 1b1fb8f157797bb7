"""FAISS: an inner-product index whose ids are rows of a cache, and exact search."""

import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.devices import AUTO
from embedcache.errors import CorruptError, DiskFullError, PathError, SettingError, quoted
from embedcache.files import replacing
from embedcache.io_errors import disk_full_message
from embedcache.progress import Progress
from embedcache.search.faiss_gpu import MOST_SELECTED, GpuSide, faiss_reason, import_faiss, num_gpus
from embedcache.search.lists import has_block_lists, open_disk_lists

_TRAINING_PER_LIST, _MIN_TRAINING = 50, 20_000
_MAPPED_FRACTION = 0.5  # of the machine's memory
_OWN = True  # FAISS takes no keyword
_READ_BYTES, _ID_BYTES = 2**20, 8
_END = b"crc32 %08x"


class RowIndex:
    """An inner-product index over vectors of length 1: a FAISS `IndexIDMap` whose ids are rows of the cache.

    It is on the CPU. Unless the device is `cpu`, FAISS's GPUs train it, assign new vectors to lists, and search batches
    (see `GpuSide`). `disk_lists` are the inverted lists that stay in a file, None if all is in memory.
    """

    def __init__(self, wrapped: Any, device: str = AUTO) -> None:
        self.wrapped, self._device = wrapped, device
        self._faiss = import_faiss()
        self._inner = self._faiss.downcast_index(wrapped.index)
        self._gpu = GpuSide(self._inner, device)
        self._rows: Ints | None = None
        self._order: Ints | None = None
        lists = self._faiss.try_extract_index_ivf(self._inner)
        self.num_lists = 0 if lists is None else int(lists.nlist)
        self.has_blocks = has_block_lists(self._inner)
        self.disk_lists = open_disk_lists(self._inner)
        self.is_graph = isinstance(self._inner, self._faiss.IndexHNSW)
        self.is_refined = isinstance(self._inner, self._faiss.IndexRefine)  # finer codes re-rank the best results
        self.is_exact = isinstance(self._inner, self._faiss.IndexFlat)  # float32 vectors are all compared

    def __len__(self) -> int:
        return int(self.wrapped.ntotal)

    @property
    def rows(self) -> Ints:
        """Rows in the order in which they were added: (N,)."""
        if self._rows is None:
            self._rows = np.asarray(self._faiss.vector_to_array(self.wrapped.id_map), np.int64)
        return self._rows

    @property
    def width(self) -> int:
        """Number of dimensions of a vector."""
        return int(self.wrapped.d)

    @property
    def code_size(self) -> int:
        """Bytes per vector in the inverted lists."""
        return int(self._faiss.extract_index_ivf(self._inner).code_size)

    @property
    def first_position(self) -> int:
        """Position of the first vector of a part, see `add_part`; lists are in the order in which they were filled."""
        lists = self._faiss.extract_index_ivf(self._inner).invlists
        return min(int(lists.get_single_id(number, 0)) for number in range(lists.nlist) if lists.list_size(number))

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return bool(self._inner.is_trained)

    @property
    def num_training(self) -> int:
        """Number of vectors to train on, if there are as many; 0 for kinds that need no training."""
        needs_none = isinstance(self._inner, self._faiss.IndexFlat | self._faiss.IndexHNSWFlat)
        return 0 if needs_none else max(_MIN_TRAINING, _TRAINING_PER_LIST * self.num_lists)

    def train(self, vectors_SP: Floats) -> None:
        """Train on a sample; `SettingError` if there are too few vectors."""
        lists, on_gpus = self._faiss.try_extract_index_ivf(self._inner), None
        if lists is not None and num_gpus(self._device):
            on_gpus = self._faiss.index_cpu_to_all_gpus(self._faiss.IndexFlatIP(lists.d))
            lists.clustering_index = on_gpus  # FAISS keeps no reference
        try:
            self.wrapped.train(vectors_SP)
        except RuntimeError as error:
            raise SettingError(
                f"factory: expected an index that FAISS can train, got an error: {faiss_reason(error)}; try --factory "
                "Flat"
            ) from error
        finally:
            if on_gpus is not None:
                lists.clustering_index = None

    def add(self, rows_B: Ints, vectors_BP: Floats) -> None:
        """Add vectors of length 1."""
        vectors_BP = np.ascontiguousarray(vectors_BP)
        lists_B = self._gpu.find_lists(vectors_BP)
        if lists_B is None:
            self.wrapped.add_with_ids(vectors_BP, rows_B)
        else:
            self._add_to_lists(vectors_BP, lists_B, None)
            num_before, rows = len(self), self.wrapped.id_map
            rows.resize(num_before + len(rows_B))
            self._faiss.rev_swig_ptr(rows.data(), rows.size())[num_before:] = rows_B
            self.wrapped.ntotal = self._inner.ntotal
        self._rows = self._order = None
        self._gpu.forget()

    def add_part(self, rows_B: Ints, vectors_BP: Floats, first: int) -> None:
        """Add vectors to a part of an inverted file that is merged later, at positions from `first` on."""
        vectors_BP, positions_B = np.ascontiguousarray(vectors_BP), first + np.arange(len(rows_B))
        lists_B = self._gpu.find_lists(vectors_BP)
        if lists_B is None:
            self._inner.add_with_ids(vectors_BP, positions_B)
        else:
            self._add_to_lists(vectors_BP, lists_B, positions_B)
        self._rows = np.concatenate([self.rows, rows_B])
        self._faiss.copy_array_to_vector(self._rows, self.wrapped.id_map)
        self.wrapped.ntotal = len(self._rows)

    def _add_to_lists(self, vectors_BP: Floats, lists_B: Ints, positions_B: Ints | None) -> None:
        """Add vectors to given lists, at the next positions if none are given: the same bytes as FAISS's own `add`."""
        faiss = self._faiss
        lists = faiss.downcast_index(faiss.extract_index_ivf(self._inner))
        positions = None if positions_B is None else faiss.swig_ptr(positions_B)
        lists.add_core(len(vectors_BP), faiss.swig_ptr(vectors_BP), positions, faiss.swig_ptr(lists_B))
        if self.is_refined:
            faiss.downcast_index(self._inner.refine_index).add(vectors_BP)
            self._inner.ntotal = lists.ntotal

    def read(self, rows: Ints) -> Floats | None:
        """Return the vectors of rows, (B, P) float32; None if the index holds codes of them, or lacks one.

        The first call sorts the rows: 8 bytes per vector.
        """
        stored = self._faiss.downcast_index(self._inner.storage) if self.is_graph else self._inner
        if not isinstance(stored, self._faiss.IndexFlat) or not len(self):
            return None
        if self._order is None:
            self._order = np.argsort(self.rows, kind="stable")
        found = np.minimum(np.searchsorted(self.rows, rows, sorter=self._order), len(self) - 1)
        positions = self._order[found]
        if (self.rows[positions] != rows).any():
            return None
        vectors_BP: Floats = stored.reconstruct_batch(np.ascontiguousarray(positions))
        return vectors_BP

    def search(
        self,
        queries_QP: Floats,
        k: int,
        parameters: Mapping[str, int] | None = None,
        *,
        is_allowed_N: Bools | None = None,
    ) -> tuple[Floats, Ints]:
        """Return the k best rows of each query, best first: scores (Q, K) float32, rows (Q, K) int64 (-1: none found).

        Of `nprobe`, `efSearch` and `k_factor`, the parameters that the kind of index has are used. `is_allowed_N` says
        which vectors may be returned, in the order of `rows`.
        """
        queries_QP, selector, found = np.ascontiguousarray(queries_QP), None, None
        if is_allowed_N is None:
            nprobe = min((parameters or {}).get("nprobe", 1), max(1, self.num_lists))
            found = self._gpu.search(queries_QP, k, nprobe)
        else:
            selector = self._faiss.IDSelectorBitmap(np.packbits(is_allowed_N, bitorder="little"))
        if found is None and self.disk_lists is not None:
            found = self.disk_lists.search(queries_QP, k, (parameters or {}).get("nprobe", 1), selector)
        if found is None:
            chosen = self._faiss_parameters(self._inner, parameters or {}, selector)
            found = self._inner.search(queries_QP, k, params=chosen)
        scores, positions = found
        if not len(self):
            return scores, positions
        rows = self._faiss.rev_swig_ptr(self.wrapped.id_map.data(), len(self))  # `rows` is a copy: seconds for billions
        return scores, np.where(positions < 0, -1, rows[positions])

    def _faiss_parameters(self, index: Any, parameters: Mapping[str, int], selector: Any) -> Any:
        faiss, index = self._faiss, self._faiss.downcast_index(index)
        if isinstance(index, faiss.IndexPreTransform):
            inner = self._faiss_parameters(index.index, parameters, selector)
            return faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexRefine):
            inner = self._faiss_parameters(index.base_index, parameters, selector)
            k_factor = float(parameters.get("k_factor", 1))
            return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=inner)
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **chosen)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=parameters.get("efSearch", index.hnsw.efSearch), **chosen)
        return faiss.SearchParameters(**chosen) if chosen else None

    def measure_latency_ms(self, queries_QP: Floats, k: int, parameters: Mapping[str, int]) -> tuple[float, float]:
        """Measure milliseconds per query: the median of single queries, and the mean of one batch."""
        self.search(queries_QP[:1], k, parameters)  # the first search starts threads
        seconds = []
        for query in queries_QP:
            started = time.perf_counter()
            self.search(query[None], k, parameters)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        self.search(queries_QP, k, parameters)
        return 1000 * float(np.median(seconds)), 1000 * (time.perf_counter() - started) / len(queries_QP)

    def write(self, path: Path) -> None:
        """Write the index atomically with its checksum at the end, read back before it replaces a file.

        FAISS does not read what follows an index. Lists on disk are looked up beside it when it is read again.

        Raises:
            OSError: a write failed; of a full disk, `DiskFullError`.
            CorruptError: the file does not hold what was written.
        """
        if self.disk_lists is not None:
            self.disk_lists.forget_folder()
        checksum = 0
        with replacing(path) as temporary:
            with temporary.open("wb") as file:  # FAISS's own files only print that closing them failed

                def write(data: bytes) -> None:
                    nonlocal checksum
                    file.write(data)
                    checksum = zlib.crc32(data, checksum)

                self._faiss.write_index(self.wrapped, self._faiss.PyCallbackIOWriter(write, _READ_BYTES))
                file.write(_END % checksum)
            if not is_whole(temporary):
                raise CorruptError(
                    f"{path}: expected the bytes that were written, got others; check the disk, and rerun the same "
                    "command"
                )

    def copy(self) -> "RowIndex":
        """Return an independent copy. Memory: the index twice more for a moment."""
        stored = self._faiss.serialize_index(self.wrapped)  # FAISS cannot clone some transforms, such as L2norm
        return RowIndex(self._faiss.deserialize_index(stored), self._device)

    def emptied(self) -> "RowIndex":
        """Return the same trained index without vectors; this object must not be used afterwards."""
        lists = self._faiss.try_extract_index_ivf(self._inner)
        if lists is None or self.is_refined or self.has_blocks:
            self.wrapped.reset()
            return RowIndex(self.wrapped, self._device)
        empty = self._faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
        lists.replace_invlists(empty, _OWN)
        empty.this.disown()
        lists.ntotal = self._inner.ntotal = self.wrapped.ntotal = 0
        self._faiss.copy_array_to_vector(np.empty(0, np.int64), self.wrapped.id_map)
        return RowIndex(self.wrapped, self._device)

    def merge_on_disk(self, parts: Sequence["RowIndex"], path: Path) -> "RowIndex":
        """Fill this trained, empty inverted file with the vectors of others; its lists become the file `path`.

        `DiskFullError` if they do not fit: FAISS maps the file, and a full disk would kill the process.
        """
        faiss = self._faiss
        inverted = faiss.extract_index_ivf(self._inner)
        needed = sum(map(len, parts)) * (inverted.code_size + _ID_BYTES)
        if shutil.disk_usage(path.parent).free < needed:
            raise DiskFullError(disk_full_message(f" of {path}, which takes {needed:,} bytes"))
        lists = faiss.OnDiskInvertedLists(inverted.nlist, inverted.code_size, str(path))
        pointers = faiss.InvertedListsPtrVector()
        for part in parts:
            pointers.push_back(faiss.extract_index_ivf(part.wrapped.index).invlists)
        with _silence_stdout():
            total = lists.merge_from_multiple(pointers.data(), pointers.size())
        inverted.replace_invlists(lists, _OWN)
        lists.this.disown()
        inverted.ntotal = self._inner.ntotal = self.wrapped.ntotal = total
        faiss.copy_array_to_vector(np.concatenate([part.rows for part in parts]), self.wrapped.id_map)
        return RowIndex(self.wrapped, self._device)

    def resume(self) -> "RowIndex":
        """Advance a graph's random levels to where they were, so that adding continues as without an interruption."""
        if self.is_graph:
            for _ in range(len(self)):
                self._inner.hnsw.random_level()
        return self


def make_index(factory: str, width: int, *, device: str = AUTO) -> RowIndex:
    """Create an empty index; `SettingError` if FAISS does not accept the factory string."""
    faiss = import_faiss()
    try:
        return RowIndex(faiss.IndexIDMap(faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)), device)
    except RuntimeError as error:
        raise SettingError(
            "factory: expected a FAISS factory string such as Flat or IVF1024,SQ8, got "
            f"{factory!r} for width {width}: {faiss_reason(error)}"
        ) from error


def read_index(path: Path, *, is_mapped: bool | None = None, device: str = AUTO) -> RowIndex:
    """Read an index that `RowIndex.write` wrote; `CorruptError` if FAISS cannot read it.

    A memory-mapped index can only be searched. By default, files larger than half of the machine's memory are mapped.
    FAISS cannot map the file of an index whose lists are another file, which is always mapped.
    """
    if not path.is_file():
        raise PathError(
            f"{path} does not exist; build an index with: embedcache curate index CACHE {quoted(path.parent)}"
        )
    if is_mapped is None:
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        is_mapped = path.stat().st_size > _MAPPED_FRACTION * machine_bytes
    faiss = import_faiss()
    try:
        if not is_mapped:
            with _silence_stdout():
                flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
                return RowIndex(faiss.read_index(str(path), flags), device)
        index = RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), device)
        return index if not index.num_lists else RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP), device)
    except (RuntimeError, AttributeError, MemoryError, ValueError) as error:
        raise CorruptError(f"{path}: expected a FAISS index of rows, got an error: {faiss_reason(error)}") from error


def exact_search(
    queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], k: int, *, device: str = AUTO
) -> tuple[Floats, Ints]:
    """Search for the true k best of each query among all vectors, best first: scores and rows, (Q, K).

    Equal scores are ordered by row. K is smaller if there are fewer vectors. Memory: a block, and 8 bytes per vector.
    """
    rows: list[Ints] = []

    def vectors() -> Iterator[Floats]:
        for rows_B, vectors_BP in blocks:
            if len(rows_B):
                rows.append(rows_B)
                yield np.ascontiguousarray(vectors_BP)

    search = import_faiss("faiss.contrib.exhaustive_search").knn_ground_truth
    gpus = num_gpus(device) if k <= MOST_SELECTED else 0
    metric = import_faiss().METRIC_INNER_PRODUCT
    scores_QK, positions_QK = search(np.ascontiguousarray(queries_QP), vectors(), k, metric_type=metric, ngpu=gpus)
    rows_N = np.concatenate([np.empty(0, np.int64), *rows])
    scores_QK = scores_QK[:, : len(rows_N)]
    rows_QK = rows_N[positions_QK[:, : len(rows_N)]]
    order_QK = np.lexsort((rows_QK, -scores_QK))
    return np.take_along_axis(scores_QK, order_QK, axis=1), np.take_along_axis(rows_QK, order_QK, axis=1)


def spherical_kmeans(
    vectors_NP: Floats,
    num_clusters: int,
    *,
    seed: int,
    iterations: int,
    max_per_cluster: int,
    progress: Progress,
    device: str = AUTO,
) -> Floats:
    """Cluster rows of length 1 by cosine similarity: (K, P) float32 centroids. Uses FAISS's GPUs unless on `cpu`."""
    progress.start(f"finding {num_clusters:,} clusters", iterations, "iterations")
    kmeans = import_faiss().Kmeans(
        vectors_NP.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=max_per_cluster,
        gpu=num_gpus(device),
    )
    kmeans.train(np.ascontiguousarray(vectors_NP, np.float32))
    progress.advance(iterations)
    progress.finish()
    centroids_KP: Floats = kmeans.centroids
    return centroids_KP


@contextmanager
def _silence_stdout() -> Iterator[None]:
    """Silence what FAISS prints about lists on disk, for which it has no setting."""
    sys.stdout.flush()
    stdout, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nothing)


def is_whole(path: Path) -> bool:
    """Return whether a file that `RowIndex.write` wrote ends with its checksum. Memory: one block."""
    left, checksum = path.stat().st_size - len(_END % 0), 0
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, _READ_BYTES))):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        return file.read() == _END % checksum
