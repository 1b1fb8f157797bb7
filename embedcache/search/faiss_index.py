"""FAISS: an inner-product index whose ids are rows of a cache, exact search, and k-means."""

import importlib
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.devices import AUTO, announce
from embedcache.errors import CorruptError, DiskFullError, PathError, SettingError
from embedcache.files import disk_full_message, replacing
from embedcache.metrics.neighbors import note_duration
from embedcache.progress import Progress
from embedcache.registry import require

_TRAINING_PER_LIST = 50
_MIN_TRAINING = 20_000
_MAPPED_FRACTION = 0.5  # of the machine's memory
_MOST_GPU_NEIGHBORS = 2048
_OWN = True  # FAISS takes no keyword
_READ_BYTES = 2**20
_ID_BYTES = 8
_SAFE = re.compile(
    r"(IVF\d+(_HNSW32)?,)?(Flat|SQ(4|6|8|fp16)|PQ\d+(x4)?|RaBitQ[1-8]?(,Refine\(SQ8\))?)|HNSW([2-9]|[1-9]\d\d?)"
)
"""Factory strings that FAISS builds or refuses; others may crash the process, such as `HNSW0`, and are tried before."""
_NUM_TRIED = 1000
_TRIAL_S = 300


class RowIndex:
    """An inner-product index over vectors of length 1: a FAISS `IndexIDMap` whose ids are rows of the cache."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self._faiss = _import_faiss()
        self._inner = self._faiss.downcast_index(wrapped.index)
        self._rows: Ints | None = None
        lists = self._faiss.try_extract_index_ivf(self._inner)
        self.num_lists = 0 if lists is None else int(lists.nlist)
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
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return bool(self._inner.is_trained)

    @property
    def num_training(self) -> int:
        """Number of vectors to train on, if there are as many; 0 for kinds that need no training."""
        needs_none = isinstance(self._inner, self._faiss.IndexFlat | self._faiss.IndexHNSWFlat)
        return 0 if needs_none else max(_MIN_TRAINING, _TRAINING_PER_LIST * self.num_lists)

    def train(self, vectors_SP: Floats, *, device: str = AUTO) -> None:
        """Train on a sample, on the GPUs that FAISS can use; `SettingError` if there are too few vectors."""
        lists = self._faiss.try_extract_index_ivf(self._inner)
        if lists is not None and num_gpus(device):
            lists.clustering_index = self._faiss.index_cpu_to_all_gpus(self._faiss.IndexFlatIP(lists.d))
        try:
            self.wrapped.train(vectors_SP)
        except RuntimeError as error:
            raise SettingError(
                f"factory: expected an index that FAISS can train, got an error: {_reason(error)}; try --factory Flat"
            ) from error

    def add(self, rows_B: Ints, vectors_BP: Floats) -> None:
        """Add vectors of length 1."""
        self.wrapped.add_with_ids(np.ascontiguousarray(vectors_BP), rows_B)
        self._rows = None

    def add_part(self, rows_B: Ints, vectors_BP: Floats, first: int) -> None:
        """Add vectors to a part of an inverted file that is merged later, at positions from `first` on."""
        self._inner.add_with_ids(np.ascontiguousarray(vectors_BP), first + np.arange(len(rows_B)))
        self._rows = np.concatenate([self.rows, rows_B])
        self._faiss.copy_array_to_vector(self._rows, self.wrapped.id_map)
        self.wrapped.ntotal = len(self._rows)

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
        selector = None
        if is_allowed_N is not None:
            selector = self._faiss.IDSelectorBitmap(np.packbits(is_allowed_N, bitorder="little"))
        chosen = self._faiss_parameters(self._inner, parameters or {}, selector)
        scores, positions = self._inner.search(np.ascontiguousarray(queries_QP), k, params=chosen)
        return scores, np.where(positions < 0, -1, self.rows[positions])

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
        """Write the index atomically, read back before it replaces a file.

        Lists on disk are looked up beside it when it is read again.

        Raises:
            OSError: a write failed; of a full disk, `DiskFullError`.
            CorruptError: the file does not hold what was written.
        """
        inverted = self._faiss.try_extract_index_ivf(self._inner)
        lists = None if inverted is None else self._faiss.downcast_InvertedLists(inverted.invlists)
        if isinstance(lists, self._faiss.OnDiskInvertedLists):
            lists.filename = Path(lists.filename).name
        with replacing(path) as temporary:
            checksum = 0
            with temporary.open("wb") as file:  # FAISS's own files only print that closing them failed

                def write(data: bytes) -> None:
                    nonlocal checksum
                    file.write(data)
                    checksum = zlib.crc32(data, checksum)

                self._faiss.write_index(self.wrapped, self._faiss.PyCallbackIOWriter(write, _READ_BYTES))
            if _checksum(temporary) != checksum:
                raise CorruptError(
                    f"{path}: expected the bytes that were written, got others; check the disk, and rerun the same "
                    "command"
                )

    def copy(self) -> "RowIndex":
        """Return an independent copy."""
        return RowIndex(self._faiss.clone_index(self.wrapped))

    def emptied(self) -> "RowIndex":
        """Return the same trained index without vectors; this object must not be used afterwards."""
        lists = self._faiss.try_extract_index_ivf(self._inner)
        if lists is None or self.is_refined:
            self.wrapped.reset()
            return RowIndex(self.wrapped)
        empty = self._faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
        lists.replace_invlists(empty, _OWN)
        empty.this.disown()
        lists.ntotal = self._inner.ntotal = self.wrapped.ntotal = 0
        self._faiss.copy_array_to_vector(np.empty(0, np.int64), self.wrapped.id_map)
        return RowIndex(self.wrapped)

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
        return RowIndex(self.wrapped)

    def resume(self) -> "RowIndex":
        """Advance a graph's random levels to where they were, so that adding continues as without an interruption."""
        if self.is_graph:
            for _ in range(len(self)):
                self._inner.hnsw.random_level()
        return self


def make_index(factory: str, width: int) -> RowIndex:
    """Create an empty index; `SettingError` if FAISS does not accept the factory string."""
    faiss = _import_faiss()
    try:
        return RowIndex(faiss.IndexIDMap(faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)))
    except RuntimeError as error:
        raise SettingError(
            "factory: expected a FAISS factory string such as Flat or IVF1024,SQ8, got "
            f"{factory!r} for width {width}: {_reason(error)}"
        ) from error


def check_factory(factory: str, width: int, num_vectors: int) -> None:
    """Check that FAISS can build an index by a factory string: some strings crash or hang the process.

    Strings that are not known to be safe are tried in a process of their own, with few vectors and lists.

    Raises:
        SettingError: more lists than vectors, or FAISS fails to build such an index.
    """
    for found in re.finditer(r"IVF(\d+)", factory):
        if not 1 <= int(found[1]) <= num_vectors:
            raise SettingError(
                f"factory: expected 1 to {num_vectors:,} lists, as there are so many vectors, got {found[1]} in "
                f"{factory!r}"
            )
    if _SAFE.fullmatch(factory):
        return
    num_tried = min(num_vectors, _NUM_TRIED)
    tried = re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), num_tried, 4)}", factory)
    call = f"_try_factory({tried!r}, {width}, {num_tried})"
    program = f"from embedcache.search.faiss_index import _try_factory; print({call})"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=_TRIAL_S,
            check=False,
        )
        reason = f"it ends with {signal.Signals(-done.returncode).name}" if done.returncode < 0 else done.stdout.strip()
    except subprocess.TimeoutExpired:
        reason = f"it takes more than {_TRIAL_S} s"
    if reason:
        raise SettingError(
            f"factory: expected one with which FAISS indexes {num_tried:,} vectors of width {width}, got {factory!r}: "
            f"{reason}; try --factory Flat"
        )


def _try_factory(factory: str, width: int, num_vectors: int) -> str:
    """Build and search an index of random vectors; return why it fails, empty if FAISS builds or refuses it."""
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (machine_bytes, machine_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vectors_NP = np.random.default_rng(0).standard_normal((num_vectors, width)).astype(np.float32)
    try:
        try:
            index = make_index(factory, width)
            index.train(vectors_NP)
        except SettingError:
            return ""
        index.add(np.arange(num_vectors), vectors_NP)
        index.search(vectors_NP[:2], 1)
    except RuntimeError as error:
        return _reason(error)
    except MemoryError:
        return "it takes more memory than this machine has"
    return ""


def read_index(path: Path, *, is_mapped: bool | None = None) -> RowIndex:
    """Read an index that `RowIndex.write` wrote; `CorruptError` if FAISS cannot read it.

    A memory-mapped index can only be searched. By default, files larger than half of the machine's memory are mapped.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; build an index with: embedcache curate index CACHE {path.parent}")
    if is_mapped is None:
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        is_mapped = path.stat().st_size > _MAPPED_FRACTION * machine_bytes
    faiss = _import_faiss()
    try:
        if not is_mapped:
            with _silence_stdout():
                return RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY))
        index = RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        return index if not index.num_lists else RowIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP))
    except (RuntimeError, AttributeError, MemoryError, ValueError) as error:
        raise CorruptError(f"{path}: expected a FAISS index of rows, got an error: {_reason(error)}") from error


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

    search = _require("faiss.contrib.exhaustive_search").knn_ground_truth
    gpus = num_gpus(device) if k <= _MOST_GPU_NEIGHBORS else 0
    metric = _import_faiss().METRIC_INNER_PRODUCT
    scores_QK, positions_QK = search(np.ascontiguousarray(queries_QP), vectors(), k, metric_type=metric, ngpu=gpus)
    rows_N = np.concatenate([np.empty(0, np.int64), *rows])
    scores_QK = scores_QK[:, : len(rows_N)]
    rows_QK = rows_N[positions_QK[:, : len(rows_N)]]
    order_QK = np.lexsort((rows_QK, -scores_QK))
    return np.take_along_axis(scores_QK, order_QK, axis=1), np.take_along_axis(rows_QK, order_QK, axis=1)


def num_gpus(device: str = AUTO) -> int:
    """Return the number of GPUs that FAISS can use: 0 with faiss-cpu, and on the device `cpu`."""
    gpus = 0 if device == "cpu" else int(getattr(_import_faiss(), "get_num_gpus", lambda: 0)())
    announce(f"FAISS: {gpus} GPUs" if gpus else "FAISS: cpu")
    return gpus


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
    """Cluster rows of length 1 by cosine similarity: (K, P) float32 centroids, after a report of how long it will take.

    Raises `MissingExtraError` without faiss.
    """
    num_pairs = iterations * min(len(vectors_NP), num_clusters * max_per_cluster) * num_clusters
    note_duration(progress, f"finding {num_clusters:,} clusters", num_pairs, vectors_NP.shape[1])
    kmeans = _import_faiss().Kmeans(
        vectors_NP.shape[1],
        num_clusters,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max_per_cluster,
        gpu=num_gpus(device),
    )
    kmeans.train(np.ascontiguousarray(vectors_NP))
    centroids_KP: Floats = kmeans.centroids
    return centroids_KP


def _import_faiss() -> Any:
    return _require("faiss")


def _require(module: str) -> Any:
    """Import a module of FAISS; the hint of what to install names the build for this machine's GPU, if it has one."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        import torch  # too slow to import where FAISS is there

        is_cuda_12 = torch.cuda.is_available() and platform.machine() == "x86_64"
        return require(module, extra="faiss-gpu" if is_cuda_12 else "faiss-cpu")


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


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file. Memory: one block."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _reason(error: Exception) -> str:
    return re.split(r"failed: |\.cpp:\d+: ", str(error).splitlines()[-1])[-1]  # without the C++ symbol
