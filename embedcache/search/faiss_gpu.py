"""FAISS as this machine has it: its import, its GPUs, and what it computes on one of them for an index on the CPU.

An index itself stays on the CPU, so that its files, filters and kinds are the same everywhere.
"""

import importlib
import platform
import re
from functools import cache
from typing import Any

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.devices import AUTO, announce
from embedcache.registry import require

GPU_BATCH = 64
"""Fewest queries of a batch that is searched on a GPU: fewer take milliseconds on the CPU, and a copy takes seconds."""

MOST_SELECTED = 2048
"""Most neighbors, and most lists per query, that FAISS selects on a GPU."""

_CODE_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
_TABLE_BYTES = 48 * 1024  # of shared memory, for the distances of one query to the 256 centroids of each byte of a code
_SCRATCH_BYTES = 2 * 2**30  # of which FAISS takes 1.5 GiB at once
_LIST_PADDING = 32  # vectors
_ID_BYTES = 8


def num_gpus(device: str = AUTO) -> int:
    """Return the number of GPUs that FAISS can use: 0 with faiss-cpu, and on the device `cpu`."""
    gpus = 0 if device == "cpu" else int(getattr(import_faiss(), "get_num_gpus", lambda: 0)())
    announce(f"FAISS: {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "FAISS: cpu")
    return gpus


class GpuSide:
    """What a GPU computes for an index on the CPU: batches of queries on a copy of it, and the lists of new vectors.

    Where FAISS has no such code, or memory is short, it returns None, and a log message says once why.

    Args:
        index: FAISS index of positions, without an `IndexIDMap` around it.
        device: torch's name of a device; FAISS uses the first GPU, or the one with that number.
    """

    def __init__(self, index: Any, device: str) -> None:
        self._index, self._device = index, device
        self._number = int(device.partition(":")[2] or 0)
        self._copy: Any = None
        self._centroids: Any = None
        self._is_usable = {"searched": device != "cpu", "filled": device != "cpu"}

    def search(self, queries_QP: Floats, k: int, nprobe: int) -> tuple[Floats, Ints] | None:
        """Search a batch on the copy: scores (Q, K) float32, positions (Q, K) int64 (-1: none found).

        They are those of the CPU up to rounding: of float32, or of float16 where a PQ code has more than 48 bytes. The
        first batch makes the copy. GPU memory: the codes, 8 bytes per vector, the centroids, and 1.5 GiB.
        """
        if len(queries_QP) < GPU_BATCH or k > MOST_SELECTED or nprobe > MOST_SELECTED or not self._can("searched"):
            return None
        faiss = import_faiss()
        try:
            if self._copy is None:
                self._make_copy()
            if self._copy is None:
                return None
            parameters = None if isinstance(self._index, faiss.IndexFlat) else faiss.SearchParametersIVF(nprobe=nprobe)
            scores_QK, positions_QK = self._copy.search(queries_QP, k, params=parameters)
        except RuntimeError as error:
            self._give_up("searched", faiss_reason(error))
            return None
        return scores_QK, positions_QK

    def find_lists(self, vectors_BP: Floats) -> Ints | None:
        """Return the inverted list that each vector is added to: (B,) int64. GPU memory: the centroids, and 1.5 GiB.

        It is that of the nearest centroid; a graph over the centroids, on the CPU, may miss it.
        """
        lists = _lists_to_fill(self._index)
        if lists is None or not self._can("filled"):
            return None
        faiss = import_faiss()
        try:
            if self._centroids is None:
                quantizer = faiss.downcast_index(lists.quantizer)
                flat = faiss.IndexFlat(lists.d, quantizer.metric_type)
                flat.add(quantizer.reconstruct_n(0, lists.nlist))
                self._centroids = faiss.index_cpu_to_gpu(_resources(), self._number, flat)
            found_B1 = self._centroids.search(vectors_BP, 1)[1]
        except RuntimeError as error:
            self._give_up("filled", faiss_reason(error))
            return None
        lists_B: Ints = np.ascontiguousarray(found_B1[:, 0])
        return lists_B

    def forget(self) -> None:
        """Free the copy, which no longer holds what the index does."""
        self._copy = None

    def _can(self, what: str) -> bool:
        return self._is_usable[what] and num_gpus(self._device) > 0

    def _make_copy(self) -> None:
        reason = gpu_obstacle(self._index) or self._memory_obstacle()
        if reason:
            self._give_up("searched", reason)
            return
        options = cloner_options(self._index)
        self._copy = import_faiss().index_cpu_to_gpu(_resources(), self._number, self._index, options)

    def _memory_obstacle(self) -> str:
        needed, free = gpu_bytes(self._index) + _SCRATCH_BYTES, _free_bytes(self._number)
        return "" if needed <= free else f"it takes {needed:,} bytes, and the GPU has {free:,} free"

    def _give_up(self, what: str, reason: str) -> None:
        self._is_usable[what], self._copy = False, None
        announce(f"FAISS: the index is {what} on the CPU ({reason})")


def gpu_obstacle(index: Any) -> str:
    """Return why FAISS can have no copy of an index on a GPU, empty if it can.

    It has `Flat`, and inverted lists in memory of `Flat`, `SQ4`, `SQ6`, `SQ8`, `SQfp16`, and `PQ` with 8 bits.
    """
    faiss, kind = import_faiss(), type(index)
    if kind in (faiss.IndexFlat, faiss.IndexFlatIP):
        return ""
    if kind not in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ):
        return f"there is no {kind.__name__} on GPUs"
    if type(faiss.downcast_InvertedLists(index.invlists)) is not faiss.ArrayInvertedLists:
        return "its lists are on disk"
    if kind is faiss.IndexIVFScalarQuantizer and index.sq.qtype not in _scalar_types():
        return "there is no such scalar quantizer on GPUs"
    if kind is faiss.IndexIVFPQ and (index.pq.nbits != 8 or index.pq.M not in _CODE_BYTES):
        return f"there is no PQ{index.pq.M}x{index.pq.nbits} on GPUs"
    return ""


def cloner_options(index: Any) -> Any:
    """Return how an index is copied: results as on the CPU, a graph over the centroids stays on the CPU."""
    faiss = import_faiss()
    options = faiss.GpuClonerOptions()
    options.use_cuvs = False
    options.allowCpuCoarseQuantizer = True
    options.useFloat16 = type(index) is faiss.IndexIVFPQ and 4 * index.pq.M * 256 > _TABLE_BYTES
    return options


def gpu_bytes(index: Any) -> int:
    """Return the GPU memory of a copy of an index: codes, ids and centroids."""
    if isinstance(index, import_faiss().IndexFlat):
        return int(4 * index.ntotal * index.d)
    num_padded = index.ntotal + _LIST_PADDING * index.nlist
    return int(num_padded * (index.code_size + _ID_BYTES) + 4 * index.nlist * index.d)


def _free_bytes(number: int) -> int:
    import torch  # takes seconds

    return int(torch.cuda.mem_get_info(number)[0]) if torch.cuda.is_available() else 0


def _lists_to_fill(index: Any) -> Any:
    """Return the inverted lists that the CPU adds vectors to when it is told their lists; None: it has none."""
    faiss = import_faiss()
    lists = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexIVFRaBitQ)
    if type(lists) not in kinds:
        return None
    has_vectors = isinstance(faiss.downcast_index(lists.quantizer), faiss.IndexFlat | faiss.IndexHNSWFlat)
    return lists if has_vectors else None


def _scalar_types() -> set[int]:
    names = ("8bit", "8bit_uniform", "8bit_direct", "4bit", "4bit_uniform", "6bit", "fp16")
    return {getattr(import_faiss().ScalarQuantizer, f"QT_{name}") for name in names}


@cache
def _resources() -> Any:
    """Return FAISS's scratch memory on GPUs, which all indexes of a process share."""
    return import_faiss().StandardGpuResources()


def import_faiss(module: str = "faiss") -> Any:
    """Import a module of FAISS; the hint of what to install names the build for this machine's GPU, if it has one."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        import torch  # too slow to import where FAISS is there

        is_cuda_12 = torch.cuda.is_available() and platform.machine() == "x86_64"
        return require(module, extra="faiss-gpu" if is_cuda_12 else "faiss-cpu")


def faiss_reason(error: Exception) -> str:
    """Return what an error of FAISS says, without the C++ symbol."""
    return re.split(r"failed: |\.(?:cpp|cu|h|cuh):\d+: ", str(error).splitlines()[-1])[-1]
