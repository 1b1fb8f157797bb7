"""Building an index over one feature of a cache: one kind after another until one reaches the recall."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.vectors import Vectors
from embedcache.errors import FingerprintError, SettingError
from embedcache.files import AnyPath, relative_location, writing
from embedcache.locks import LOCK, locked
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import prepare_folder, record_stage
from embedcache.search.autotune import (
    Configuration,
    IndexQuality,
    draw_query_set,
    fit_memory,
    in_memory_configurations,
    measure_index,
    on_disk_configurations,
)
from embedcache.search.building import FILES, IndexBuilder, remove_leftovers
from embedcache.search.card import (
    CARD,
    INDEX,
    STATE,
    IndexCard,
    check_card,
    may_hold_removed,
    read_card,
    verify_index,
    write_card,
)
from embedcache.search.faiss_index import RowIndex, check_factory, read_index
from embedcache.search.settings import IndexSettings
from embedcache.settings import merge_settings

if TYPE_CHECKING:
    from embedcache.options import IndexOptions


def build_index(
    cache: AnyPath,
    index: AnyPath,
    settings: IndexSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["IndexOptions"],
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
    settings = merge_settings(IndexSettings, settings, options)
    index, progress = Path(index), to_progress(progress)
    vectors = Vectors(
        cache,
        settings.modality,
        settings.feature,
        settings.run,
        width=settings.width,
        device=settings.device,
    )
    if not (index / CARD).is_file():  # so that nothing is put into a folder of others
        _candidates(settings, len(vectors.rows), vectors.width)
        if settings.factory is not None:
            check_factory(settings.factory, len(vectors.rows))
        allowed = [LOCK, CARD, *FILES]
        prepare_folder(index, kind="an index", marker=LOCK, allowed=allowed)
    with locked(index):
        card = read_card(index) if (index / CARD).is_file() else None
        if card is not None:
            _check_reuse(index, card, vectors, settings)
        if card is None or _is_outdated(index, card, vectors):
            is_started = (index / STATE).is_file()  # the index may be newer than its card
            if card is not None and not is_started:
                verify_index(index, card, progress=progress)
            card = _build(index, vectors, card, settings, progress)
            write_card(index, card)
        remove_leftovers(index, lists=card.lists)
    return card


def _is_outdated(index_path: Path, card: IndexCard, vectors: Vectors) -> bool:
    """Return whether items were added to the cache of an index, or removed from it."""
    if card.num_vectors != len(vectors.rows):
        return True
    if not may_hold_removed(card, vectors.cache):
        return False
    is_started = (index_path / STATE).is_file()  # the files may be newer than the card
    return is_started or not np.isin(_read_rows(index_path, card), vectors.rows).all()


def _read_rows(index_path: Path, card: IndexCard) -> Ints:
    return read_index(index_path / INDEX, is_mapped=card.lists is None).rows


def _candidates(settings: IndexSettings, num_vectors: int, width: int) -> list[Configuration]:
    if settings.factory is not None:
        return [Configuration(factory=settings.factory, memory_bytes=0, is_on_disk=settings.on_disk)]
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
    requested = {**source, "index_digest": card.index_digest, "factory": factory, "width": vectors.width}
    check_card(index_path, card, requested, next_step=new_folder)
    memory = _grown(card, len(vectors.rows)).memory_bytes or card.file_bytes
    if settings.memory is not None and memory > settings.memory:
        raise SettingError(
            f"memory: expected an index of at most {settings.memory:,} bytes, got {memory:,} with "
            f"{len(vectors.rows):,} items for {index_path}, {card.factory}; {new_folder} for a smaller one"
        )
    if card.recall_at_10 < settings.min_recall:
        raise SettingError(
            f"min_recall: expected an index with recall@10 of at least {settings.min_recall:g}, got "
            f"{card.recall_at_10:.3f} for {index_path}; {new_folder} for a better one"
        )


def _build(
    index_path: Path, vectors: Vectors, old: IndexCard | None, settings: IndexSettings, progress: Progress
) -> IndexCard:
    """Build an index, write it and record how; a finished index keeps its configuration."""
    source, num = _source(vectors, index_path), len(vectors.rows)
    if vectors.width < vectors.full_width:  # an unfinished index of the whole width does not name it
        source["width"] = vectors.width
    record = {
        **source,
        "cache": str(vectors.cache.path),
        "run": str(vectors.run_path),
        "factory": settings.factory,
        "memory_bytes": settings.memory,
        "min_recall": settings.min_recall,
        "on_disk": settings.on_disk,
    }
    started = time.perf_counter()
    with record_stage(index_path / "record.json", "index", record) as outcome, writing(index_path):
        builder = IndexBuilder(
            index_path,
            source,
            vectors.cache.info,
            card=old,
            device=vectors.device,
        )
        accepted = _find_index(builder, index_path, vectors, old, settings, progress)
        card = _card(
            vectors,
            index_path,
            accepted,
            min_recall=settings.min_recall,
            checksums=builder.write(accepted.index),
            seconds=time.perf_counter() - started,
        )
        outcome.update({"recall_at_10": card.recall_at_10, "num_vectors": num})
        if old is not None:
            outcome.update({"recall_at_10_before": old.recall_at_10, "num_vectors_before": old.num_vectors})
    return card


@dataclass(frozen=True)
class _AcceptedIndex:
    """The index that reaches the recall, with the candidate it was built from and its measured quality."""

    index: RowIndex
    candidate: Configuration
    quality: IndexQuality


def _find_index(
    builder: IndexBuilder,
    index_path: Path,
    vectors: Vectors,
    old: IndexCard | None,
    settings: IndexSettings,
    progress: Progress,
) -> _AcceptedIndex:
    """Build one candidate after another until one reaches the recall.

    A finished index, `old`, is the only candidate. It is filled before it is judged, and kept below the recall if its
    files hold removed samples.
    """
    num = len(vectors.rows)
    left = _candidates(settings, num, vectors.width) if old is None else [_grown(old, num)]
    must_keep = old is not None and may_hold_removed(old, vectors.cache)
    least, queries = settings.min_recall if old is None else 0.0, None
    while left:
        candidate, left = left[0], left[1:]
        if builder.rejected.get(candidate.factory, 1) >= settings.min_recall:
            index = builder.build(candidate, vectors, progress, checkpoint_s=settings.checkpoint_s, min_recall=least)
            if index is not None:
                queries = queries or draw_query_set(vectors, progress)
                quality = measure_index(index, queries, settings.min_recall, progress)
                if quality.recall_at_10 >= settings.min_recall or must_keep:
                    return _AcceptedIndex(index, candidate, quality)
                builder.reject(candidate.factory, quality.recall_at_10)
                progress.note(f"{candidate.factory}: recall@10 {quality.recall_at_10:.3f} is too low, not kept")
        if not candidate.factory.startswith("HNSW"):  # the next ones have fewer bits, and miss more
            break
    raise SettingError(_recall_error(builder.rejected, index_path, settings))


def _recall_error(rejected: Mapping[str, float], index_path: Path, settings: IndexSettings) -> str:
    factory, recall = max(rejected.items(), key=lambda pair: pair[1])
    unchanged = "; the old index is unchanged" if (index_path / CARD).is_file() else ""
    larger = "leave --factory out" if settings.factory else "give more --memory, or --on-disk"
    return (
        f"min_recall: expected an index with recall@10 of at least {settings.min_recall:g}, got {recall:.3f} from the "
        f"best, {factory}, with its most thorough search{unchanged}; {larger}, or lower it to "
        "less than that with --min-recall"
    )


def _card(
    vectors: Vectors,
    index_path: Path,
    accepted: _AcceptedIndex,
    *,
    min_recall: float,
    seconds: float,
    checksums: Mapping[str, str],
) -> IndexCard:
    """Return the card of an index whose files are written; `checksums` of each file."""
    index, candidate = accepted.index, accepted.candidate
    return IndexCard(
        **_source(vectors, index_path),
        factory=candidate.factory,
        num_vectors=len(index),
        width=vectors.width,
        **asdict(accepted.quality),
        min_recall=min_recall,
        memory_bytes=candidate.memory_bytes or None,
        file_bytes=sum((index_path / name).stat().st_size for name in checksums),
        num_training=min(index.num_training, len(index)),
        seconds=round(seconds, 3),
        lists=index.lists_file,
        checksums=checksums,
    )


def _source(vectors: Vectors, index_path: Path) -> dict[str, Any]:
    """Return what an index is built from, as fields of the card on disk."""
    return {
        "cache": relative_location(vectors.cache.path, index_path),
        "index_digest": vectors.cache.info.index_digest,
        "modality": vectors.modality,
        "feature": vectors.feature.name,
        "spec": vectors.feature.spec,
        "fingerprint": vectors.feature.fingerprint,
        "run": None if vectors.run_path is None else relative_location(vectors.run_path, index_path),
        "run_weights": None if vectors.run is None else vectors.run.info.weights,
    }


def _grown(card: IndexCard, num_vectors: int) -> Configuration:
    """Return an index's configuration for the present number of items."""
    memory_bytes = round((card.memory_bytes or 0) * num_vectors / card.num_vectors)
    return Configuration(factory=card.factory, memory_bytes=memory_bytes, is_on_disk=card.lists is not None)
