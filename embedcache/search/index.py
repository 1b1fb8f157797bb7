"""Building an index over one feature of a cache, with a card that states its contents and measured recall."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.devices import AUTO
from embedcache.errors import CorruptError, FingerprintError, SettingError, UnfinishedError
from embedcache.files import AnyPath, disk_errors, relative_location
from embedcache.locks import LOCK, locked
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import (
    DIGEST,
    check_same,
    fields_of,
    from_record,
    prepare_folder,
    read_json,
    read_manifest,
    record_stage,
    to_record,
    write_record,
)
from embedcache.search.autotune import (
    Configuration,
    IndexQuality,
    draw_query_set,
    fit_memory,
    in_memory_configurations,
    measure_index,
    on_disk_configurations,
    remaining_candidates,
    sampled_recall,
)
from embedcache.search.building import FILES, STATE, IndexBuilder, lists_name, remove_leftovers
from embedcache.search.factories import check_factory
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.search.settings import IndexSettings
from embedcache.search.vectors import Vectors
from embedcache.settings import replace_flat
from embedcache.store.arrays import check_file, file_checksum
from embedcache.store.cache import Cache

FORMAT_VERSION = 3
_UNCHECKED = ("cache", "run")
"""Keys of a card that its digest leaves out: paths that may be corrected by hand when folders have moved."""


@dataclass(frozen=True, kw_only=True)
class IndexCard:
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
        min_recall: requested `recall_at_10`; 0 in format 1.
        recall_at_1: fraction of queries whose nearest neighbor is found first; this and all below: None in format 1.
        batch_latency_ms: milliseconds per query in one batch, on its GPU if FAISS can search the index there.
        memory_bytes: memory while searching, by formula; None for a given factory string.
        file_bytes: size of `index.faiss` and of the file of lists.
        num_training: number of vectors it was trained on.
        seconds: duration of this build; of an interrupted one, since it was resumed.
        lists: file of inverted lists that stay on disk during search; None: all is in memory.
        checksums: `index.faiss` and the file of lists -> CRC-32C of its bytes; the first cards of format 3 have none.
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
    search: Mapping[str, int] = field(default_factory=dict)
    min_recall: float = 0.0
    recall_at_1: float | None = None
    batch_latency_ms: float | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    num_training: int | None = None
    seconds: float | None = None
    lists: str | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION


def build_index(
    cache: AnyPath,
    index: AnyPath,
    settings: IndexSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> IndexCard:
    """Index all valid items of a feature, and measure the index against exact search.

    An interrupted build resumes from its last checkpoint, and a finished index gains the items that were added to the
    cache, without being trained again, if it is of the same feature and run. An index of samples that were removed from
    the cache since is filled again without them, and kept whatever its recall. Any other that misses the requested
    recall is deleted.

    Memory: the index, a chunk of the feature, and a sample to train on; with lists on disk, 256 MB of codes.

    Args:
        cache: path or URL of the cache.
        index: folder for `index.faiss` and `card.json`.
        settings: what is indexed, and which kind of index is built.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: nothing fits the memory, or nothing that fits reaches the recall; the message says what would.
        FingerprintError: the run was trained on another encoder's features, or the folder holds another index.
        PathError: the folder holds other files.
        UnfinishedError: chunks of the feature are missing.
        DataError: the feature has several vectors per item, or no valid item.
    """
    settings = replace_flat(settings or IndexSettings(), options)
    index, progress = Path(index), to_progress(progress)
    vectors = Vectors(
        cache,
        settings.modality,
        settings.feature,
        settings.run,
        width=settings.width,
        device=settings.device,
    )
    if not (index / "card.json").is_file():  # so that nothing is put into a folder of others
        _candidates(settings, len(vectors.rows), vectors.width)
        if settings.factory is not None:
            check_factory(settings.factory, vectors.width, len(vectors.rows))
        allowed = [LOCK, "card.json", *FILES]
        prepare_folder(index, kind="an index", marker=LOCK, allowed=allowed)
    with locked(index):
        card = read_card(index) if (index / "card.json").is_file() else None
        if card is not None:
            _check_reuse(index, card, vectors, settings)
        if card is None or _is_outdated(index, card, vectors):
            if card is not None and not (index / STATE).is_file():  # else the index may be newer than its card
                _check_files(index, card.checksums)
            card = _build(index, vectors, card, settings, progress)
            write_record(index / "card.json", to_record(card), unchecked=_UNCHECKED)
        remove_leftovers(index, lists=card.lists)
    return card


def _is_outdated(index_path: Path, card: IndexCard, vectors: Vectors) -> bool:
    """Return whether items were added to the cache of an index, or removed from it."""
    if card.num_vectors != len(vectors.rows):
        return True
    if not may_hold_removed(card, vectors.cache):
        return False
    is_started = (index_path / STATE).is_file()  # the files may be newer than the card
    return is_started or not np.isin(read_index(index_path / "index.faiss", is_mapped=True).rows, vectors.rows).all()


def may_hold_removed(card: IndexCard, cache: Cache) -> bool:
    """Return whether an index was built before samples were removed from its cache, as far as its card tells."""
    return bool(cache.info.removed) and card.index_digest != cache.info.index_digest


def read_card(index_path: Path) -> IndexCard:
    """Read an index's card.

    Raises:
        PathError: there is no finished index.
        ArtifactError: its format is later, or the card has changed since it was written.
    """
    path = index_path / "card.json"
    make = f"embedcache curate index CACHE {index_path}"
    values = read_manifest(
        path,
        kind="index",
        latest_format=FORMAT_VERSION,
        make=make,
        next_step=f"restore it, or {_rebuild(index_path)}",
        unchecked=_UNCHECKED,
    )
    values.pop(DIGEST, None)
    return fields_of(path, lambda: IndexCard(**from_record(values)))


def open_row_index(index_path: Path, card: IndexCard, *, device: str = AUTO) -> RowIndex:
    """Open the index that a card describes, whose files are compared with their checksums once in a process.

    Raises:
        PathError: a file is missing.
        CorruptError: a file has other bytes, or is not the index that the card describes.
        UnfinishedError: an extension was killed, or is still running, between the index and its card.
    """
    try:
        _check_files(index_path, card.checksums)
    except CorruptError as error:
        if not (index_path / STATE).is_file():
            raise
        finished = read_json(index_path / STATE).get("checksums")
        if finished is None:
            raise UnfinishedError(
                f"{index_path} is being extended, or was when a process ended; run the same embedcache curate index "
                "again"
            ) from error
        _check_files(index_path, finished)  # the longer index, whose card is not written yet
        return read_index(index_path / "index.faiss", device=device)
    index = read_index(index_path / "index.faiss", device=device)
    found, expected = (len(index), index.width), (card.num_vectors, card.width)
    if found != expected and card.checksums:
        raise CorruptError(
            f"{index_path / 'index.faiss'}: expected {expected[0]:,} vectors of width {expected[1]:,}, as its card "
            f"states, got {found[0]:,} of {found[1]:,}; {_rebuild(index_path)}"
        )
    return index


def _check_files(index_path: Path, checksums: Mapping[str, str]) -> None:
    for name, checksum in checksums.items():
        check_file(index_path / name, checksum, next_step=_rebuild(index_path))


def _rebuild(index_path: Path) -> str:
    return f"remove {index_path} and build it again: embedcache curate index CACHE {index_path}"


def check_card(index_path: Path, card: IndexCard, requested: Mapping[str, Any], *, next_step: str) -> None:
    """Check that an index is of what was requested, as fields of the card on disk, `modality` and `feature` among them.

    The `FingerprintError` names each field that differs; if it is of another feature, only that.
    """
    record = to_record(card)
    for names in (("modality", "feature"), requested):
        check_same(
            f"index {index_path}",
            {name: record[name] for name in names},
            {name: requested[name] for name in names},
            next_step=next_step,
        )


def _candidates(settings: IndexSettings, num_vectors: int, width: int) -> list[Configuration]:
    if settings.factory is not None:
        return [Configuration(factory=settings.factory, memory_bytes=0, bits=0, is_on_disk=settings.on_disk)]
    kinds = on_disk_configurations if settings.on_disk else in_memory_configurations
    return fit_memory(kinds(num_vectors, width), settings.memory)


def _check_reuse(index_path: Path, card: IndexCard, vectors: Vectors, settings: IndexSettings) -> None:
    """Check that a finished index is what the settings request."""
    new_folder = "give the path of a new folder"
    if not vectors.cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(
            f"index {index_path}: expected the samples of {vectors.cache.path}, got others; {new_folder}"
        )
    factory = settings.factory or card.factory
    source = _source(vectors, index_path)
    requested = {**source, "spine": card.index_digest, "factory": factory, "width": vectors.width}
    check_card(index_path, card, requested, next_step=new_folder)
    memory = _grown(card, len(vectors.rows)).memory_bytes or card.file_bytes or 0
    if settings.memory is not None and memory > settings.memory:
        raise SettingError(
            f"memory: expected an index of at most {settings.memory:,} bytes, got {memory:,} with "
            f"{len(vectors.rows):,} items for {index_path}, {card.factory}; {new_folder} for a smaller one"
        )
    if card.format > 1 and card.recall_at_10 < settings.min_recall:
        raise SettingError(
            f"min_recall: expected an index with recall@10 of at least {settings.min_recall:g}, got "
            f"{card.recall_at_10:.3f} for {index_path}; {new_folder} for a better one"
        )


def _build(
    index_path: Path, vectors: Vectors, old: IndexCard | None, settings: IndexSettings, progress: Progress
) -> IndexCard:
    """Build one candidate after another until one reaches the recall; a finished index keeps its configuration."""
    source, num = _source(vectors, index_path), len(vectors.rows)
    if vectors.width < vectors.full_width:  # an unfinished index of the whole width does not name it
        source["width"] = vectors.width
    left = _candidates(settings, num, vectors.width) if old is None else [_grown(old, num)]
    record = {
        **source,
        "cache": str(vectors.cache.path),
        "run": str(vectors.run_path),
        "factory": settings.factory,
        "memory_bytes": settings.memory,
        "min_recall": settings.min_recall,
        "on_disk": settings.on_disk,
    }
    started, queries = time.perf_counter(), None
    with record_stage(index_path / "record.json", "index", record) as outcome, disk_errors(index_path):
        builder = IndexBuilder(
            index_path,
            source,
            vectors.cache.info,
            lists=None if old is None else old.lists,
            device=vectors.device,
        )
        must_keep = old is not None and may_hold_removed(old, vectors.cache)
        while left:
            candidate, left = left[0], left[1:]
            if builder.rejected.get(candidate.factory, 1) >= settings.min_recall:
                index = _fill(builder, candidate, vectors, settings, progress, can_refuse=old is None)
                if index is None:
                    left = remaining_candidates(left, candidate)
                    continue
                queries = queries or draw_query_set(vectors, progress)
                quality = measure_index(index, queries, settings.min_recall)
                if quality.recall_at_10 >= settings.min_recall or must_keep:
                    index.write(index_path / "index.faiss")
                    lists = lists_name(num) if candidate.is_on_disk else None
                    checksums = {name: file_checksum(index_path / name) for name in ("index.faiss", lists) if name}
                    builder.record_files(checksums)
                    outcome.update({"recall_at_10": quality.recall_at_10, "num_vectors": num})
                    if old is not None:
                        before = {"recall_at_10_before": old.recall_at_10, "num_vectors_before": old.num_vectors}
                        outcome.update(before)
                    seconds = time.perf_counter() - started
                    card = _card(vectors, index_path, candidate, index, quality, settings.min_recall, seconds)
                    return replace(card, checksums=checksums)
                builder.reject(candidate.factory, quality.recall_at_10)
                progress.note(f"{candidate.factory}: recall@10 {quality.recall_at_10:.3f} is too low, not kept")
            left = remaining_candidates(left, candidate)
        raise SettingError(_recall_error(builder.rejected, index_path, settings))


def _fill(
    builder: IndexBuilder,
    candidate: Configuration,
    vectors: Vectors,
    settings: IndexSettings,
    progress: Progress,
    *,
    can_refuse: bool,
) -> RowIndex | None:
    """Build one candidate; None if a sample shows that its codes cannot reach the recall."""
    if candidate.is_on_disk:
        return builder.fill_on_disk(candidate, vectors, progress)
    index = builder.start(candidate, vectors, progress)
    if can_refuse and not len(index) and (recall := sampled_recall(index, vectors)) < settings.min_recall:
        builder.reject(candidate.factory, recall)
        progress.note(f"{candidate.factory}: recall@10 {recall:.3f} on a sample is too low, not built")
        return None
    builder.fill(index, candidate, vectors, progress, checkpoint_s=settings.checkpoint_s)
    return index


def _recall_error(rejected: Mapping[str, float], index_path: Path, settings: IndexSettings) -> str:
    factory, recall = max(rejected.items(), key=lambda pair: pair[1])
    unchanged = "; the old index is unchanged" if (index_path / "card.json").is_file() else ""
    larger = "leave --factory out" if settings.factory else "give more --memory, or --on-disk"
    return (
        f"min_recall: expected an index with recall@10 of at least {settings.min_recall:g}, got {recall:.3f} from the "
        f"best, {factory}, with its most thorough search{unchanged}; {larger}, or lower it to "
        "less than that with --min-recall"
    )


def _card(
    vectors: Vectors,
    index_path: Path,
    candidate: Configuration,
    index: RowIndex,
    quality: IndexQuality,
    min_recall: float,
    seconds: float,
) -> IndexCard:
    lists = lists_name(len(index)) if candidate.is_on_disk else None
    return IndexCard(
        **from_record(_source(vectors, index_path)),
        factory=candidate.factory,
        num_vectors=len(index),
        width=vectors.width,
        **asdict(quality),
        min_recall=min_recall,
        memory_bytes=candidate.memory_bytes or None,
        file_bytes=sum((index_path / name).stat().st_size for name in ("index.faiss", lists) if name),
        num_training=min(index.num_training, len(index)),
        seconds=round(seconds, 3),
        lists=lists,
    )


def _source(vectors: Vectors, index_path: Path) -> dict[str, Any]:
    """Return what an index is built from, as fields of the card on disk."""
    return {
        "cache": relative_location(vectors.cache.path, index_path),
        "spine": vectors.cache.info.index_digest,
        "modality": vectors.modality,
        "feature": vectors.feature.name,
        "spec": vectors.feature.spec,
        "fingerprint": vectors.feature.fingerprint,
        "run": None if vectors.run_path is None else relative_location(vectors.run_path, index_path),
        "run_weights": None if vectors.config is None else vectors.config.weights_digest,
    }


def _grown(card: IndexCard, num_vectors: int) -> Configuration:
    """Return an index's configuration for the present number of items."""
    memory_bytes = round((card.memory_bytes or 0) * num_vectors / card.num_vectors)
    return Configuration(factory=card.factory, memory_bytes=memory_bytes, bits=0, is_on_disk=card.lists is not None)
