"""FAISS: its import and its GPUs, an index whose ids are rows of a cache, exact search and k-means.

An index stays on the CPU, so that its files, filters and kinds are the same everywhere. GPUs train it, and search large
batches on a copy of it.
"""

import importlib
import os
import platform
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.devices import AUTO, announce
from embedcache.errors import CorruptError, DiskFullError, PathError, SettingError, quoted
from embedcache.files import disk_full_message, replacing
from embedcache.progress import Progress
from embedcache.registry import require

GPU_BATCH = 64
"""Fewest queries of a batch that is searched on a GPU: fewer take milliseconds on the CPU, and a copy takes seconds."""

MOST_SELECTED = 2048
"""Most neighbors, and most lists per query, that FAISS selects on a GPU."""

_CODES = r"(Flat|SQ4|SQ6|SQ8|SQfp16)"
_FACTORY = re.compile(rf"{_CODES}|IVF(?P<lists>\d+)(_HNSW32)?,({_CODES}|PQ\d+(x4)?)|HNSW([2-9]|[1-9]\d\d?)")
"""Accepted factory strings: some others crash FAISS, and some have scores that are not cosines, or no filters."""

_TRAINING_PER_LIST, _MIN_TRAINING = 50, 20_000
_MAPPED_FRACTION = 0.5  # of the machine's memory
_OWN = True  # FAISS takes no keyword
_READ_BYTES, _ID_BYTES = 2**20, 8
_END = b"crc32 %08x"


def import_faiss(module: str = "faiss") -> Any:
    """Import a module of FAISS; the hint of what to install names the build for this machine's GPU, if it has one."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        import torch  # too slow to import where FAISS is there

        is_cuda_12 = torch.cuda.is_available() and platform.machine() == "x86_64"
        return require(module, extra="faiss-gpu" if is_cuda_12 else "faiss-cpu")


def num_gpus(device: str = AUTO) -> int:
    """Return the number of GPUs that FAISS can use: 0 with faiss-cpu, and on the device `cpu`."""
    gpus = 0 if device == "cpu" else int(getattr(import_faiss(), "get_num_gpus", lambda: 0)())
    announce(f"FAISS: {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "FAISS: cpu")
    return gpus


@cache
def _gpu_resources() -> Any:
    """Return FAISS's scratch memory on GPUs, which all indexes of a process share."""
    return import_faiss().StandardGpuResources()


def _reason(error: Exception) -> str:
    """Return what an error of FAISS says, without the C++ symbol."""
    return re.split(r"failed: |\.(?:cpp|cu|h|cuh):\d+: ", str(error).splitlines()[-1])[-1]


class RowIndex:
    """An inner-product index over vectors of length 1: a FAISS `IndexIDMap` whose ids are rows of the cache.

    Unless the device is `cpu`, FAISS's GPUs train it, and the first of them searches large batches on a copy of it.
    `lists_file` is the name of the file that its inverted lists stay in, None if all is in memory.
    """

    def __init__(self, wrapped: Any, device: str = AUTO) -> None:
        self.wrapped, self._device = wrapped, device
        self._faiss = import_faiss()
        self._inner = self._faiss.downcast_index(wrapped.index)
        self._on_gpu: Any = None
        self._rows: Ints | None = None
        self._order: Ints | None = None

        lists = self._faiss.try_extract_index_ivf(self._inner)
        self.num_lists = 0 if lists is None else int(lists.nlist)
        inverted = None if lists is None else self._faiss.downcast_InvertedLists(lists.invlists)
        self.disk_lists: Any = inverted if isinstance(inverted, self._faiss.OnDiskInvertedLists) else None
        self.is_graph = isinstance(self._inner, self._faiss.IndexHNSW)
        self.is_exact = isinstance(self._inner, self._faiss.IndexFlat)  # float32 vectors are all compared

    def __len__(self) -> int:
        return int(self.wrapped.ntotal)

    @property
    def lists_file(self) -> str | None:
        """Name of the file of the inverted lists, which is beside that of the index."""
        return None if self.disk_lists is None else Path(self.disk_lists.filename).name

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
                f"factory: expected an index that FAISS can train, got an error: {_reason(error)}; try --factory Flat"
            ) from error
        finally:
            if on_gpus is not None:
                lists.clustering_index = None

    def add(self, rows_B: Ints, vectors_BP: Floats) -> None:
        """Add vectors of length 1."""
        self.wrapped.add_with_ids(np.ascontiguousarray(vectors_BP), rows_B)
        self._rows = self._order = self._on_gpu = None

    def add_part(self, rows_B: Ints, vectors_BP: Floats, first: int) -> None:
        """Add vectors to a part of an inverted file that is merged later, at positions from `first` on."""
        self._inner.add_with_ids(np.ascontiguousarray(vectors_BP), first + np.arange(len(rows_B)))
        self._rows = np.concatenate([self.rows, rows_B])
        self._faiss.copy_array_to_vector(self._rows, self.wrapped.id_map)
        self.wrapped.ntotal = len(self._rows)

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

        Of `nprobe` and `efSearch`, the parameter that the kind of index has is used. `is_allowed_N` says which vectors
        may be returned, in the order of `rows`.
        """
        queries_QP, parameters = np.ascontiguousarray(queries_QP), parameters or {}
        selector, found = None, None
        if is_allowed_N is None:
            found = self._search_on_gpu(queries_QP, k, min(parameters.get("nprobe", 1), max(1, self.num_lists)))
        else:
            selector = self._faiss.IDSelectorBitmap(np.packbits(is_allowed_N, bitorder="little"))
        if found is None:
            found = self._inner.search(queries_QP, k, params=self._search_parameters(parameters, selector))

        scores, positions = found
        if not len(self):
            return scores, positions
        rows = self._faiss.rev_swig_ptr(self.wrapped.id_map.data(), len(self))  # `rows` is a copy: seconds for billions
        return scores, np.where(positions < 0, -1, rows[positions])

    def _search_parameters(self, parameters: Mapping[str, int], selector: Any) -> Any:
        faiss, chosen = self._faiss, {} if selector is None else {"sel": selector}
        if self.num_lists:
            return faiss.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **chosen)
        if self.is_graph:
            return faiss.SearchParametersHNSW(efSearch=parameters.get("efSearch", self._inner.hnsw.efSearch), **chosen)
        return faiss.SearchParameters(**chosen) if chosen else None

    def _search_on_gpu(self, queries_QP: Floats, k: int, nprobe: int) -> tuple[Floats, Ints] | None:
        """Search a large batch on a copy on the first GPU; None without a GPU, and where FAISS cannot do it."""
        is_large = len(queries_QP) >= GPU_BATCH and max(k, nprobe) <= MOST_SELECTED
        if not is_large or self.disk_lists is not None or not num_gpus(self._device):
            return None
        faiss = self._faiss
        try:
            if self._on_gpu is None:
                options = faiss.GpuClonerOptions()
                options.use_cuvs = False  # it finds other neighbors than the CPU
                options.allowCpuCoarseQuantizer = True  # a graph over the centroids
                options.useFloat16 = isinstance(self._inner, faiss.IndexIVFPQ)  # larger tables do not fit
                number = int(self._device.partition(":")[2] or 0)
                self._on_gpu = faiss.index_cpu_to_gpu(_gpu_resources(), number, self._inner, options)
            parameters = faiss.SearchParametersIVF(nprobe=nprobe) if self.num_lists else None
            found: tuple[Floats, Ints] = self._on_gpu.search(queries_QP, k, params=parameters)
        except RuntimeError as error:  # FAISS has no such index on GPUs, or too little memory there
            announce(f"FAISS: the index is searched on the CPU ({_reason(error)})")
            self._device = "cpu"
            return None
        return found

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
            self.disk_lists.filename = self.lists_file
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
        return RowIndex(self._faiss.clone_index(self.wrapped), self._device)

    def emptied(self) -> "RowIndex":
        """Return the same trained index without vectors; this object must not be used afterwards."""
        lists = self._faiss.try_extract_index_ivf(self._inner)
        if lists is None:
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
    """Create an empty index; `SettingError` if FAISS does not accept the factory string for this width."""
    faiss = import_faiss()
    try:
        return RowIndex(faiss.IndexIDMap(faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)), device)
    except RuntimeError as error:
        raise SettingError(
            f"factory: expected one that FAISS builds for width {width}, got {factory!r}: {_reason(error)}"
        ) from error


def check_factory(factory: str, num_vectors: int) -> None:
    """Check that a factory string is one that is accepted, and has no more lists than vectors; else `SettingError`."""
    match = _FACTORY.fullmatch(factory)
    if match is None:
        raise SettingError(
            "factory: expected HNSWm, codes Flat, SQ4, SQ6, SQ8 or SQfp16, or IVFn or IVFn_HNSW32 with these, PQm or "
            f"PQmx4, such as HNSW32 or IVF4096,SQfp16, got {factory!r}"
        )
    num_lists = int(match["lists"] or 1)
    if not 1 <= num_lists <= num_vectors:
        raise SettingError(
            f"factory: expected 1 to {num_vectors:,} lists, as there are so many vectors, got {num_lists} in "
            f"{factory!r}"
        )


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
        if is_mapped:
            index = RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), device)
            if index.num_lists:
                index = RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP), device)
        else:
            with _silence_stdout():
                flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
                index = RowIndex(faiss.read_index(str(path), flags), device)
    except (RuntimeError, AttributeError, MemoryError, ValueError) as error:
        raise CorruptError(f"{path}: expected a FAISS index of rows, got an error: {_reason(error)}") from error

    # FAISS maps the file of the lists without a look at its size.
    lists = index.disk_lists
    if lists is not None and not is_mapped:
        lists_path = path.with_name(Path(lists.filename).name)
        size = lists_path.stat().st_size
        if size != lists.totsize:
            raise CorruptError(f"{lists_path}: expected {lists.totsize:,} bytes, as the index states, got {size:,}")
    return index


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
