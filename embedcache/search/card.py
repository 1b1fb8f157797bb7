"""The card of an index, which states its contents and measured recall, and opening the files that it describes.

While an index is built or extended, `building.json` says what is done.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embedcache.errors import CorruptError, quoted
from embedcache.processes import AUTO, announce
from embedcache.progress import Progress
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    Manifest,
    check_same,
    construct,
    read_json,
    read_manifest,
    write_record,
)
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.store.arrays import check_file, file_checksum
from embedcache.store.cache import Cache

CARD = "card.json"
STATE = "building.json"
"""See `BuildState`. A finished index has none."""

_COMPARED_BYTES = 4 * 10**9
_UNCHECKED = ("cache", "run")
"""Keys of a card that its digest leaves out: paths that may be corrected by hand when folders have moved."""


class IndexFile(Manifest):
    """A file of an index: its size, and the CRC-32C of all its bytes as 8 hex digits."""

    num_bytes: int
    checksum: str


class IndexCard(Manifest):
    """Content of an index's `card.json`, which is written after the index.

    Args:
        cache: path of the cache relative to the index's folder, so that both can move together.
        index_digest: digest of the sample and item tables.
        modality: modality of the indexed items.
        feature: indexed feature as `encoder/feature`.
        spec: encoder of that feature.
        fingerprint: fingerprint of the feature.
        run: relative path of the run that projected the feature; None: the plain feature.
        run_weights: SHA-256 of that run's weights.
        factory: FAISS factory string.
        num_vectors: number of items.
        width: width of a vector; of a smaller width than the space has, these are its first components, scaled to
            length 1 again, and so are queries.
        recall_at_10: fraction of the true 10 nearest neighbors that the index finds, on `num_queries` queries that
            tuned nothing: items of the other modality for a projected index, else items of the index, which do not
            count as their own neighbors.
        num_queries: number of queries measured.
        latency_ms: median milliseconds of a single query on the CPU of the machine that built the index.
        search: FAISS search parameters that tuning chose.
        min_recall: requested `recall_at_10`.
        recall_at_1: fraction of queries whose nearest neighbor is found first.
        memory_bytes: memory while searching, by formula; None for a given factory string.
        on_disk: whether the inverted lists stay on disk during search.
        files: FAISS indexes, `index-N.faiss`, and the row of each of their vectors, `index-N.rows.npy`. There is one
            index, or with lists on disk several, each of which has a part of the vectors.
        format: version of the format on disk.
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
    files: Mapping[str, IndexFile]
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
    files: Mapping[str, IndexFile] = {}


def read_state(index_path: Path) -> BuildState:
    """Read the state of an unfinished index; `CorruptError` if the file does not hold one."""
    path = index_path / STATE
    return construct(path, lambda: BuildState.model_validate(read_json(path)))


def describe_files(index_path: Path, names: Iterable[str]) -> dict[str, IndexFile]:
    """Return the entries of files in a manifest."""
    paths = [index_path / name for name in names]
    return {path.name: IndexFile(num_bytes=path.stat().st_size, checksum=file_checksum(path)) for path in paths}


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
