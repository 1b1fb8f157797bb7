"""An index on disk and in memory: its card and files, FAISS and its GPUs, exact search and k-means.

The card states the contents and the measured recall of an index whose ids are rows of a cache. While an index is built
or extended, `building.json` says what is done.

An index stays on the CPU, so that its files, filters and kinds are the same everywhere. GPUs train it, and search large
batches on a copy of it.
"""

import importlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, read_npy
from embedcache.errors import CorruptError, SettingError, quoted
from embedcache.files import replacing
from embedcache.processes import AUTO, announce
from embedcache.progress import Progress
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    FileName,
    Manifest,
    check_same,
    construct,
    read_json,
    read_manifest,
    write_record,
)
from embedcache.registry import require
from embedcache.store.arrays import ListedFile, check_file
from embedcache.store.cache import Cache

GPU_BATCH = 64
"""Fewest queries of a batch that is searched on a GPU: fewer take milliseconds on the CPU, and a copy takes seconds."""

MOST_SELECTED = 2048
"""Most neighbors, and most lists per query, that FAISS selects on a GPU."""

_CODES = r"(Flat|SQ4|SQ6|SQ8|SQfp16)"
_FACTORY = re.compile(rf"{_CODES}|IVF(?P<lists>\d+)(_HNSW32)?,({_CODES}|PQ\d+(x4)?)|HNSW([2-9]|[1-9]\d\d?)")
"""Accepted factory strings: some others crash FAISS, and some have scores that are not cosines, or no filters."""

_TRAINING_PER_LIST = 50
_MIN_TRAINING = 20_000
_WRITE_BYTES = 2**20
_PREFETCH_THREADS = 32  # of FAISS, which read lists on disk before they are searched

CARD = "card.json"
STATE = "building.json"
"""See `BuildState`. A finished index has none."""

_COMPARED_BYTES = 4 * 10**9
_UNCHECKED = ("cache", "run")
"""Keys of a card that its digest leaves out: paths that may be corrected by hand when folders have moved."""


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
    """A FAISS index over vectors of length 1, by inner product, whose ids are rows of a cache.

    Inverted lists contain these ids; other kinds are wrapped in an `IndexIDMap`. Unless the device is `cpu`, FAISS's
    GPUs train it, and the first of them searches large batches on a copy of it.

    Args:
        index: the FAISS index.
        rows: (N,) row of each vector, in the order in which they were added.
        device: FAISS uses GPUs unless it is `cpu`.
    """

    def __init__(self, index: Any, rows: Ints | None = None, device: str = AUTO) -> None:
        self.index = index
        self._device = device
        self._faiss = import_faiss()
        self._rows = [np.empty(0, np.int64) if rows is None else rows]
        self._order: Ints | None = None
        self._on_gpu: Any = None
        self._lists: Any = None  # of an index whose lists stay on disk

        self._has_id_map = isinstance(index, self._faiss.IndexIDMap)
        self._inner = self._faiss.downcast_index(index.index) if self._has_id_map else index
        self.num_lists = 0 if self._has_id_map else int(index.nlist)
        self.is_graph = isinstance(self._inner, self._faiss.IndexHNSW)
        self.is_exact = isinstance(self._inner, self._faiss.IndexFlat)  # float32 vectors are all compared

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def rows(self) -> Ints:
        """Rows in the order in which they were added: (N,)."""
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0]

    @property
    def width(self) -> int:
        """Number of dimensions of a vector."""
        return int(self.index.d)

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes in inverted lists; 0 for other kinds."""
        return len(self) * int(self.index.code_size) if self.num_lists else 0

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return bool(self.index.is_trained)

    @property
    def num_training(self) -> int:
        """Number of vectors to train on, if there are as many; 0 for kinds that need no training."""
        needs_none = isinstance(self._inner, self._faiss.IndexFlat | self._faiss.IndexHNSWFlat)
        return 0 if needs_none else max(_MIN_TRAINING, _TRAINING_PER_LIST * self.num_lists)

    def train(self, vectors_SP: Floats) -> None:
        """Train on a sample; `SettingError` if there are too few vectors."""
        on_gpus = None
        if self.num_lists and num_gpus(self._device):
            on_gpus = self._faiss.index_cpu_to_all_gpus(self._faiss.IndexFlatIP(self.width))
            self.index.clustering_index = on_gpus  # FAISS keeps no reference

        try:
            self.index.train(vectors_SP)
        except RuntimeError as error:
            raise SettingError(
                f"factory: expected an index that FAISS can train, got an error: {_reason(error)}; try --factory Flat"
            ) from error
        finally:
            if on_gpus is not None:
                self.index.clustering_index = None

    def add(self, rows_B: Ints, vectors_BP: Floats) -> None:
        """Add vectors of length 1."""
        self.index.add_with_ids(np.ascontiguousarray(vectors_BP), rows_B)
        self._rows.append(rows_B)
        self._order = self._on_gpu = None

    def reset(self) -> None:
        """Remove all vectors; the training stays."""
        self.index.reset()
        self._rows = [np.empty(0, np.int64)]
        self._order = self._on_gpu = None

    def resume(self) -> None:
        """Advance a graph's random levels to where they were, so that adding continues as without an interruption."""
        if self.is_graph:
            for _ in range(len(self)):
                self._inner.hnsw.random_level()

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

        Of `nprobe` and `efSearch`, the parameter that the kind of index has is used. `is_allowed_N` says of each row of
        the cache whether it may be returned.
        """
        queries_QP = np.ascontiguousarray(queries_QP)
        parameters = parameters or {}
        chosen: dict[str, Any] = {}
        if is_allowed_N is not None:
            chosen["sel"] = self._faiss.IDSelectorBitmap(np.packbits(is_allowed_N, bitorder="little"))
        else:
            nprobe = min(parameters.get("nprobe", 1), max(1, self.num_lists))
            on_gpu = self._search_on_gpu(queries_QP, k, nprobe)
            if on_gpu is not None:
                return on_gpu

        if self.num_lists:
            params = self._faiss.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **chosen)
        elif self.is_graph:
            ef_search = parameters.get("efSearch", self._inner.hnsw.efSearch)
            params = self._faiss.SearchParametersHNSW(efSearch=ef_search, **chosen)
        else:
            params = self._faiss.SearchParameters(**chosen) if chosen else None
        found: tuple[Floats, Ints] = self.index.search(queries_QP, k, params=params)
        return found

    def _search_on_gpu(self, queries_QP: Floats, k: int, nprobe: int) -> tuple[Floats, Ints] | None:
        """Search a large batch on a copy on the first GPU; None without a GPU, and where FAISS cannot do it."""
        is_large = len(queries_QP) >= GPU_BATCH and max(k, nprobe) <= MOST_SELECTED
        if not is_large or self._lists is not None or not num_gpus(self._device):
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
            scores_QK, ids_QK = self._on_gpu.search(queries_QP, k, params=parameters)
        except RuntimeError as error:  # FAISS has no such index on GPUs, or too little memory there
            announce(f"FAISS: the index is searched on the CPU ({_reason(error)})")
            self._device = "cpu"
            return None

        if self._has_id_map and len(self):
            ids_QK = np.where(ids_QK < 0, -1, self.rows[ids_QK])
        return scores_QK, ids_QK

    def write(self, path: Path) -> None:
        """Write the index and beside it its rows, each atomically; `DiskFullError` on a full disk."""
        with replacing(rows_path(path)) as temporary, temporary.open("wb") as file:
            np.save(file, self.rows)
        with replacing(path) as temporary, temporary.open("wb") as file:
            # FAISS's own files only print that closing them failed.
            self._faiss.write_index(self.index, self._faiss.PyCallbackIOWriter(file.write, _WRITE_BYTES))


def rows_path(path: Path) -> Path:
    """Return the file of the rows beside the file of an index."""
    return path.with_suffix(".rows.npy")


def make_index(factory: str, width: int, *, device: str = AUTO) -> RowIndex:
    """Create an empty index; `SettingError` if FAISS does not accept the factory string for this width."""
    faiss = import_faiss()
    with_ids = factory if factory.startswith("IVF") else f"IDMap,{factory}"
    try:
        return RowIndex(faiss.index_factory(width, with_ids, faiss.METRIC_INNER_PRODUCT), device=device)
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


def read_index(paths: Sequence[Path], *, is_mapped: bool = False, device: str = AUTO) -> RowIndex:
    """Read an index that `RowIndex.write` wrote; `CorruptError` if FAISS cannot read it.

    Args:
        paths: the file; of an index whose lists stay on disk, the files of all parts.
        is_mapped: leave the inverted lists on disk; such an index can only be searched.
        device: FAISS uses GPUs unless it is `cpu`.
    """
    faiss = import_faiss()
    rows = [np.asarray(read_npy(rows_path(path)), np.int64) for path in paths]
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if is_mapped else 0
    try:
        index = faiss.read_index(str(paths[0]), flags)
        parts = [_take_lists(faiss.read_index(str(path), flags), len(paths)) for path in paths] if is_mapped else []
        row_index = RowIndex(index, np.concatenate(rows), device)
    except (RuntimeError, AttributeError, MemoryError, ValueError) as error:
        name = " or ".join(map(str, paths))
        raise CorruptError(f"{name}: expected a FAISS index of rows, got an error: {_reason(error)}") from error

    if parts:
        pointers = faiss.InvertedListsPtrVector()
        for part in parts:
            pointers.push_back(part)
        lists = faiss.HStackInvertedLists(pointers.size(), pointers.data())
        index.replace_invlists(lists)
        index.ntotal = sum(map(len, rows))
        row_index._lists = lists  # FAISS keeps no reference
    return row_index


def _take_lists(index: Any, num_parts: int) -> Any:
    """Return the inverted lists of an index, which is deleted with its centroids; they stay mapped until the end."""
    lists = import_faiss().downcast_InvertedLists(index.invlists)
    index.own_invlists = False
    lists.prefetch_nthread = max(1, _PREFETCH_THREADS // num_parts)
    return lists


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


class IndexCard(Manifest):
    """Content of an index's `card.json`, which is written after the index.

    Args:
        cache: path of the cache relative to the index's folder, so that both can move together.
        index_digest: digest of the sample and item tables.
        modality: modality of the indexed items.
        feature: indexed feature as `encoder/feature`.
        spec: encoder of that feature.
        fingerprint: fingerprint of the feature.
        run: relative path of the run that projected the feature. None for the plain feature.
        run_weights: SHA-256 of that run's weights.
        factory: FAISS factory string.
        num_vectors: number of items.
        width: width of a vector. If it is smaller than the width of the space, vectors and queries are cut to their
            first components and scaled to length 1 again.
        recall_at_10: fraction of the true 10 nearest neighbors that the index finds, on `num_queries` queries that
            tuned nothing: items of the other modality for a projected index, else items of the index, which do not
            count as their own neighbors.
        num_queries: number of queries measured.
        latency_ms: median milliseconds of a single query on the CPU of the machine that built the index.
        search: FAISS search parameters that tuning chose.
        min_recall: requested `recall_at_10`.
        recall_at_1: fraction of queries whose nearest neighbor is found first.
        memory_bytes: memory while searching, by formula. None for a given factory string.
        on_disk: whether the inverted lists stay on disk during search.
        files: FAISS indexes, `index-N.faiss`, and the row of each of their vectors, `index-N.rows.npy`. There is one
            index, or with lists on disk several, each of which has a part of the vectors.
        format: version of the format on disk.

    Example:
        >>> card = embedcache.build_index("cache", "card-index", run="run")
        >>> card.num_vectors, card.factory, card.recall_at_10 >= card.min_recall
        (60, 'Flat', True)
    """

    cache: str
    index_digest: str
    modality: str
    feature: str
    spec: str
    fingerprint: Mapping[str, Any]
    run: str | None
    run_weights: str | None
    factory: str
    num_vectors: int
    width: int
    recall_at_10: float
    num_queries: int
    latency_ms: float
    search: Mapping[str, int]
    min_recall: float
    recall_at_1: float
    memory_bytes: int | None
    on_disk: bool
    files: Mapping[FileName, ListedFile]
    format: int = FORMAT

    @property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files.values())


def read_card(index_path: Path) -> IndexCard:
    """Read an index's card.

    Raises:
        PathError: there is no finished index.
        ArtifactError: it has another format, or the card has changed since it was written.
    """
    path = index_path / CARD
    make = f"embedcache curate index CACHE {quoted(index_path)}"
    values = read_manifest(
        path,
        kind="index",
        make=lambda: make,
        next_step=f"restore it, or {rebuild_step(index_path)}",
        unchecked=_UNCHECKED,
    )
    values.pop(DIGEST, None)
    return construct(path, lambda: IndexCard.model_validate(values))


def write_card(index_path: Path, card: IndexCard) -> None:
    """Write an index's card, which marks the index as finished."""
    write_record(index_path / CARD, card.to_json(), unchecked=_UNCHECKED)


class BuildState(Manifest):
    """Content of `building.json`, the manifest of an index that is being built or extended.

    Args:
        source: what the index is built from, as fields of the card.
        factory: FAISS factory string of the kind that is being built; None before the first one.
        files: as in the card, of the vectors that were added so far.
    """

    source: Mapping[str, Any]
    factory: str | None = None
    files: Mapping[FileName, ListedFile] = {}


def read_state(index_path: Path) -> BuildState:
    """Read the state of an unfinished index; `CorruptError` if the file does not hold one."""
    path = index_path / STATE
    return construct(path, lambda: BuildState.model_validate(read_json(path)))


def index_paths(index_path: Path, files: Iterable[str]) -> list[Path]:
    """Return the paths of the FAISS indexes among the files of a manifest, in order."""
    return [index_path / name for name in files if name.endswith(".faiss")]


def may_hold_removed(card: IndexCard, cache: Cache) -> bool:
    """Return whether an index was built before samples were removed from its cache, as far as its card tells."""
    return bool(cache.info.removed) and card.index_digest != cache.info.index_digest


def open_row_index(index_path: Path, card: IndexCard, *, device: str = AUTO) -> RowIndex:
    """Open the index that a card describes, whose files are compared with their checksums once in a process.

    An index above 4 GB is compared by `verify_index` only, and a message says so.

    Raises:
        PathError: a file is missing.
        CorruptError: a file has other bytes, or is not the index that the card describes.
    """
    next_step = rebuild_step(index_path)
    is_large = card.file_bytes > _COMPARED_BYTES
    if is_large:
        announce(f"{index_path} is large and not compared with its checksums; to do so: embedcache verify {index_path}")
    for name, file in card.files.items():
        path = index_path / name
        if not is_large or not path.is_file():
            check_file(path, file.checksum, next_step=next_step)
        elif path.stat().st_size != file.num_bytes:
            size = path.stat().st_size
            raise CorruptError(f"{path}: expected {file.num_bytes:,} bytes, got {size:,}; {next_step}")

    index = read_index(index_paths(index_path, card.files), is_mapped=card.on_disk, device=device)
    found = (len(index), len(index.rows), index.width)
    if found != (card.num_vectors, card.num_vectors, card.width):
        raise CorruptError(
            f"{index_path}: expected {card.num_vectors:,} vectors of width {card.width}, as its card states, got "
            f"{found[0]:,} of {found[2]}, of {found[1]:,} rows; {next_step}"
        )
    return index


def verify_index(index_path: Path, card: IndexCard, *, progress: Progress | None = None) -> None:
    """Compare all bytes of an index with their checksums; raises what `open_row_index` raises."""
    for name, file in card.files.items():
        check_file(index_path / name, file.checksum, next_step=rebuild_step(index_path), once=False, progress=progress)
    open_row_index(index_path, card, device="cpu")


def check_card(index_path: Path, card: IndexCard, requested: Mapping[str, Any], *, next_step: str) -> None:
    """Check that an index is of what was requested, as fields of the card on disk, `modality` and `feature` among them.

    The `FingerprintError` names each field that differs; if it is of another feature, only that.
    """
    record = card.to_json()
    for names in (("modality", "feature"), requested):
        check_same(
            f"index {index_path}",
            {name: record[name] for name in names},
            {name: requested[name] for name in names},
            next_step=next_step,
        )


def rebuild_step(index_path: Path) -> str:
    """Return what to do about a damaged index."""
    return f"remove {index_path} and build it again: embedcache curate index CACHE {quoted(index_path)}"
