"""The card of an index, which states its contents and measured recall, and opening the files that it describes.

While an index is built or extended, `building.json` says what is done.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedcache.devices import AUTO, announce
from embedcache.errors import CorruptError, UnfinishedError, quoted
from embedcache.progress import Progress
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    Manifest,
    check_same,
    construct,
    read_json,
    read_manifest,
    write_json,
    write_record,
)
from embedcache.search.faiss_index import RowIndex, is_whole, read_index
from embedcache.store.arrays import check_file, file_checksum
from embedcache.store.cache import Cache

CARD = "card.json"
INDEX = "index.faiss"
STATE = "building.json"
"""See `BuildState`; there is none in a finished index."""

_COMPARED_BYTES = 4 * 10**9
_UNCHECKED = ("cache", "run")
"""Keys of a card that its digest leaves out: paths that may be corrected by hand when folders have moved."""


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
        batch_latency_ms: milliseconds per query in one batch, on its GPU if FAISS can search the index there.
        memory_bytes: memory while searching, by formula; None for a given factory string.
        file_bytes: size of `index.faiss` and of the file of lists.
        num_training: number of vectors it was trained on.
        seconds: duration of this build; of an interrupted one, since it was resumed.
        lists: file of inverted lists that stay on disk during search; None: all is in memory.
        checksums: `index.faiss`, and the file of lists if there is one -> CRC-32C of its bytes.
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
    batch_latency_ms: float
    memory_bytes: int | None
    file_bytes: int
    num_training: int
    seconds: float
    lists: str | None
    checksums: Mapping[str, str]
    format: int = FORMAT


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
        next_step=f"restore it, or {_rebuild(index_path)}",
        unchecked=_UNCHECKED,
    )
    values.pop(DIGEST, None)
    return construct(path, lambda: IndexCard.model_validate(values))


def write_card(index_path: Path, card: IndexCard) -> None:
    """Write an index's card, which marks the index as finished."""
    write_record(index_path / CARD, card.to_json(), unchecked=_UNCHECKED)


class BuildState(Manifest):
    """Content of an index's `building.json`, which there is while it is built or extended.

    Args:
        source: what the index is built from, as fields of the card.
        factory: FAISS factory string of the kind that is being built; None: none yet, or it was rejected.
        rejected: recall of each kind that missed the requested one.
        checksums: by file: as `lists`, of the lists that `index.faiss` will name; as `checksums`, of all files as the
            card will state them.
    """

    source: Mapping[str, Any]
    factory: str | None = None
    rejected: Mapping[str, float] = {}
    checksums: Mapping[str, Mapping[str, str]] = {}

    @property
    def finished(self) -> Mapping[str, str]:
        """Checksums of all files of an index that lacks nothing but its card; empty before."""
        return self.checksums.get("checksums", {})

    @property
    def recorded(self) -> dict[str, str]:
        """Checksums of all files that were recorded."""
        return {**self.finished, **self.checksums.get("lists", {})}


def read_state(index_path: Path) -> BuildState:
    """Read the state of an unfinished index; `CorruptError` if the file does not hold one."""
    path = index_path / STATE
    return construct(path, lambda: BuildState.model_validate(read_json(path)))


def write_state(index_path: Path, state: BuildState) -> None:
    """Write the state of an unfinished index."""
    write_json(index_path / STATE, state.to_json())


def may_hold_removed(card: IndexCard, cache: Cache) -> bool:
    """Return whether an index was built before samples were removed from its cache, as far as its card tells."""
    return bool(cache.info.removed) and card.index_digest != cache.info.index_digest


def open_row_index(index_path: Path, card: IndexCard, *, device: str = AUTO) -> RowIndex:
    """Open the index that a card describes, whose files are compared with their checksums once in a process.

    A file above 4 GB is compared by `verify_index` only, and a message says so.

    Raises:
        PathError: a file is missing.
        CorruptError: a file has other bytes, or is not the index that the card describes.
        UnfinishedError: an extension was killed, or is still running, between the index and its card.
    """
    try:
        index = _open(index_path, card.checksums, device)
        found, expected = (len(index), index.width), (card.num_vectors, card.width)
        if found != expected:
            raise CorruptError(
                f"{index_path / INDEX}: expected {expected[0]:,} vectors of width {expected[1]:,}, as its card "
                f"states, got {found[0]:,} of {found[1]:,}; {_rebuild(index_path)}"
            )
    except CorruptError as error:
        if not (index_path / STATE).is_file():
            raise
        finished = read_state(index_path).finished
        if INDEX not in finished or file_checksum(index_path / INDEX) != finished[INDEX]:
            if not is_whole(index_path / INDEX):
                raise
            raise UnfinishedError(
                f"{index_path} is being extended, or was when a process ended; run the same embedcache curate index "
                "again"
            ) from error
        return _open(index_path, finished, device)  # the longer index, whose card is not written yet
    return index


def verify_index(index_path: Path, card: IndexCard, *, progress: Progress | None = None) -> None:
    """Compare all bytes of an index with their checksums, lists on disk too; raises what `open_row_index` raises."""
    for name, checksum in card.checksums.items():
        check_file(index_path / name, checksum, next_step=_rebuild(index_path), once=False, progress=progress)
    open_row_index(index_path, card, device="cpu")


def check_lists(index_path: Path, index: RowIndex, checksums: Mapping[str, str]) -> None:
    """Compare the lists that an index has on disk with their checksum; raises what `open_row_index` raises."""
    if (name := index.lists_file) is not None:
        check_file(index_path / name, checksums.get(name, ""), next_step=_rebuild(index_path))


def _open(index_path: Path, checksums: Mapping[str, str], device: str) -> RowIndex:
    for name, checksum in checksums.items():
        path = index_path / name
        if path.is_file() and path.stat().st_size > _COMPARED_BYTES:
            announce(f"{path} is large and is not compared with its checksum; to do so: embedcache verify {index_path}")
        else:
            check_file(path, checksum, next_step=_rebuild(index_path))

    has_lists = len(checksums) > 1
    index = read_index(index_path / INDEX, is_mapped=False if has_lists else None, device=device)
    if has_lists and index.lists_file not in checksums:
        raise CorruptError(
            f"{index_path / INDEX}: expected lists in {' or '.join({*checksums} - {INDEX})}, got {index.lists_file}; "
            f"{_rebuild(index_path)}"
        )
    return index


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


def _rebuild(index_path: Path) -> str:
    return f"remove {index_path} and build it again: embedcache curate index CACHE {quoted(index_path)}"
