"""Building an index over one feature of a cache, with a card that says what it holds and how good it is."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedcache.errors import FingerprintError, SettingError
from embedcache.files import LOCK, disk_errors, is_remote, locked
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import (
    check_same,
    claim_folder,
    fields_of,
    from_record,
    read_manifest,
    run_record,
    to_record,
    write_json,
)
from embedcache.search.autotune import (
    Configuration,
    IndexQuality,
    configurations,
    draw_query_set,
    fit_memory,
    measure,
    on_disk,
    remaining_candidates,
)
from embedcache.search.building import CHECKPOINT_S, FILES, IndexBuilder, clean, lists_name
from embedcache.search.faiss_index import RowIndex
from embedcache.search.vectors import Vectors

FORMAT_VERSION = 3
MIN_RECALL = 0.95


@dataclass(frozen=True, kw_only=True)
class IndexCard:
    """The content of an index's `card.json`, written after the index.

    Args:
        cache: path of the cache, seen from the index's folder: what moves together goes on working.
        index_digest: identity of its rows.
        modality: of the indexed items.
        feature: `encoder/feature` that was indexed.
        spec: what opens that feature's encoder again.
        fingerprint: what decided the feature.
        run: path of the run whose tower projected it, alike; None for the plain feature.
        run_weights: SHA-256 of that run's weights.
        factory: FAISS factory string.
        num_vectors: how many items.
        width: of a vector.
        recall_at_10: share of the true 10 nearest that the index finds, on `num_queries` queries that tuned nothing:
            captions or images of the other modality for a projected index, else its own, which are no answers
            to themselves.
        num_queries: how many queries measured.
        latency_ms: median of single queries, on the machine that built it.
        search: FAISS's search parameters that were chosen.
        min_recall: `recall_at_10` that was asked for; 0 in format 1.
        recall_at_1: share of queries whose nearest is found first; from here on None in format 1.
        batch_latency_ms: a query, of all in one batch.
        memory_bytes: by formula, while searching; None for a factory string of one's own.
        file_bytes: size of `index.faiss`, and of its lists where these are a file.
        num_training: vectors it was trained on.
        seconds: that this build took; of one that was stopped, since it went on.
        lists: the file beside the index that its lists are left in, while it is searched too; None: all is in memory.
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
    format: int = FORMAT_VERSION


def build_index(
    cache_path: Path | str,
    index_path: Path | str,
    *,
    run_path: Path | str | None = None,
    feature: str | None = None,
    modality: str = "image",
    factory: str | None = None,
    memory_bytes: int | None = None,
    leaves_on_disk: bool = False,
    min_recall: float = MIN_RECALL,
    checkpoint_s: float = CHECKPOINT_S,
    progress: Progress | None = None,
) -> IndexCard:
    """Index all valid items of a feature, and measure the index against exact search.

    A build that was stopped goes on from its last checkpoint, and a finished index of the same gains the items that it
    lacks. An index that misses the recall is not kept.

    Memory: the index, a chunk of the feature, and a sample to train on; of one left on the disk, 256 MB of its codes.

    Args:
        cache_path: the cache.
        index_path: a folder for `index.faiss` and `card.json`.
        run_path: project the feature with this run; None indexes the plain feature.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        modality: `image` or `text`.
        factory: FAISS factory string; None tries the kinds of `configurations`, in their order.
        memory_bytes: what the index may take while it is searched; None is any.
        leaves_on_disk: whether the vectors' codes stay in a file, and are no memory; a finished index stays as it is.
        min_recall: least share of the true 10 nearest that it must find, 0 to 1.
        checkpoint_s: seconds between checkpoints.
        progress: told about items.

    Raises:
        SettingError: nothing fits the memory, or nothing that fits reaches the recall; says what would. Or a factory
            string and a memory.
        FingerprintError: the run was trained on another encoder's features, or the folder holds another index.
        PathError: the folder holds other things.
        UnfinishedError: the feature has missing chunks.
        DataError: the feature has several vectors an item, or no valid item.
    """
    if not 0 <= min_recall <= 1:
        raise SettingError(f"the least recall is {min_recall}; it must be 0 to 1")
    index_path, progress = Path(index_path), progress or NullProgress()
    vectors = Vectors(cache_path, modality, feature, run_path)
    request = IndexRequest(factory=factory, memory_bytes=memory_bytes, min_recall=min_recall, on_disk=leaves_on_disk)
    if not (index_path / "card.json").is_file():  # so that nothing is put into a folder of others
        request.candidates(len(vectors.rows), vectors.width)
        if not (index_path / LOCK).is_file():
            _claim(index_path)
    with locked(index_path):
        card = read_card(index_path) if (index_path / "card.json").is_file() else None
        if card is not None:
            _check_again(index_path, card, _about(vectors, index_path), vectors, request)
        if card is None or card.num_vectors < len(vectors.rows):
            card = _build(index_path, vectors, card, request, checkpoint_s, progress)
            write_json(index_path / "card.json", to_record(card))
        clean(index_path, lists=card.lists)
    return card


def _claim(index_path: Path) -> None:
    claim_folder(index_path, kind="an index", sign=LOCK, ours=[LOCK, "card.json", *FILES])


def read_card(index_path: Path) -> IndexCard:
    """Read an index's card.

    Raises:
        PathError: the folder is no finished index.
        ArtifactError: it is of a later format.
        CorruptError: it does not hold what it should.
    """
    path = index_path / "card.json"
    make = f"embedcache curate index CACHE {index_path}"
    values = read_manifest(path, kind="index", latest_format=FORMAT_VERSION, make=make)
    return fields_of(path, lambda: IndexCard(**from_record(values)))


def check_card(index_path: Path, card: IndexCard, asked: Mapping[str, Any], *, next_step: str) -> None:
    """Refuse an index of something else than asked; where it is of another feature, that alone is said.

    Args:
        index_path: of the index.
        card: its card.
        asked: fields of the card as on disk, `modality` and `feature` among them.
        next_step: what to do.

    Raises:
        FingerprintError: names each field that differs with both values.
    """
    record = to_record(card)
    for names in (("modality", "feature"), asked):
        check_same(
            f"index {index_path}",
            {name: record[name] for name in names},
            {name: asked[name] for name in names},
            next_step=next_step,
        )


@dataclass(frozen=True, kw_only=True)
class IndexRequest:
    factory: str | None
    memory_bytes: int | None
    min_recall: float
    on_disk: bool

    def candidates(self, num_vectors: int, width: int) -> list[Configuration]:
        if self.factory is None:
            kinds = on_disk if self.on_disk else configurations
            return fit_memory(kinds(num_vectors, width), self.memory_bytes)
        if self.memory_bytes is not None:
            raise SettingError(
                f"the factory string {self.factory!r} says how large the index is; give it or a memory, not both"
            )
        return [Configuration(factory=self.factory, memory_bytes=0, bits=0, is_on_disk=self.on_disk)]


def _build(
    index_path: Path,
    vectors: Vectors,
    old: IndexCard | None,
    request: IndexRequest,
    checkpoint_s: float,
    progress: Progress,
) -> IndexCard:
    """Build one candidate after another until one reaches the recall; of a finished index, its own kind alone."""
    if old is None:
        _claim(index_path)
    about, num = _about(vectors, index_path), len(vectors.rows)
    left = request.candidates(num, vectors.width) if old is None else [_grown(old, num)]
    settings = {**about, "cache": str(vectors.cache.path), "run": str(vectors.run_path), **asdict(request)}
    started, questions = time.perf_counter(), None
    with run_record(index_path / "record.json", "index", settings) as outcome, disk_errors(index_path):
        building = IndexBuilder(index_path, about, vectors.cache.info, lists=None if old is None else old.lists)
        while left:
            candidate, left = left[0], left[1:]
            if building.refused.get(candidate.factory, 1) >= request.min_recall:
                index = building.fill(candidate, vectors, progress, checkpoint_s=checkpoint_s)
                questions = questions or draw_query_set(vectors)
                measured = measure(index, questions, request.min_recall)
                if measured.recall_at_10 >= request.min_recall:
                    building.finish(index)
                    outcome.update({"recall_at_10": measured.recall_at_10, "num_vectors": num})
                    seconds = time.perf_counter() - started
                    return _card(vectors, index_path, candidate, index, measured, request, seconds)
                building.refuse(candidate.factory, measured.recall_at_10)
                progress.note(
                    f"{candidate.factory} finds {measured.recall_at_10:.3f} of the 10 nearest, and is dropped"
                )
            left = remaining_candidates(left, candidate)
        raise SettingError(_too_poor(building.refused, index_path, request))


def _too_poor(refused: Mapping[str, float], index_path: Path, request: IndexRequest) -> str:
    factory, recall = max(refused.items(), key=lambda pair: pair[1])
    stays = "; the old index stays as it was" if (index_path / "card.json").is_file() else ""
    room = "leave --factory out" if request.factory else "give more --memory"
    return (
        f"no index reaches recall@10 {request.min_recall:g}: the best, {factory}, finds {recall:.3f} however far it "
        f"searches{stays}; {room}, or ask for --min-recall {int(100 * recall) / 100:g}"
    )


def _card(
    vectors: Vectors,
    index_path: Path,
    candidate: Configuration,
    index: RowIndex,
    measured: IndexQuality,
    request: IndexRequest,
    seconds: float,
) -> IndexCard:
    lists = lists_name(len(index)) if candidate.is_on_disk else None
    return IndexCard(
        **from_record(_about(vectors, index_path)),
        factory=candidate.factory,
        num_vectors=len(index),
        width=vectors.width,
        recall_at_10=measured.recall_at_10,
        num_queries=measured.num_queries,
        latency_ms=measured.latency_ms,
        search=measured.effort,
        min_recall=request.min_recall,
        recall_at_1=measured.recall_at_1,
        batch_latency_ms=measured.batch_latency_ms,
        memory_bytes=candidate.memory_bytes or None,
        file_bytes=sum((index_path / name).stat().st_size for name in ("index.faiss", lists) if name),
        num_training=min(index.num_training, len(index)),
        seconds=round(seconds, 3),
        lists=lists,
    )


def _about(vectors: Vectors, index_path: Path) -> dict[str, Any]:
    """Say what an index is made from."""
    return {
        "cache": _relative(vectors.cache.path, index_path),
        "spine": vectors.cache.info.index_digest,
        "modality": vectors.modality,
        "feature": vectors.side.name,
        "spec": vectors.side.spec,
        "fingerprint": vectors.side.fingerprint,
        "run": None if vectors.run_path is None else _relative(vectors.run_path, index_path),
        "run_weights": None if vectors.config is None else vectors.config.weights_digest,
    }


def _check_again(
    index_path: Path, card: IndexCard, about: Mapping[str, Any], vectors: Vectors, request: IndexRequest
) -> None:
    """Refuse to use a finished index for something that it is not."""
    if not vectors.cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(
            f"index {index_path} was made from other samples than {vectors.cache.path} holds; "
            "give the path of a new folder"
        )
    asked = {**about, "spine": card.index_digest, "factory": request.factory or card.factory}
    check_card(index_path, card, asked, next_step="give the path of a new folder")
    takes = _grown(card, len(vectors.rows)).memory_bytes or card.file_bytes or 0
    if request.memory_bytes is not None and takes > request.memory_bytes:
        raise SettingError(
            f"index {index_path}, {card.factory}, takes {takes:,} bytes of memory with {len(vectors.rows):,} items; "
            f"--memory is {request.memory_bytes:,}: give the path of a new folder for a smaller one"
        )
    if card.format > 1 and card.recall_at_10 < request.min_recall:
        raise SettingError(
            f"index {index_path} has recall@10 {card.recall_at_10:.3f}, requested {request.min_recall:g}; give the "
            "path of a new folder for a better one"
        )


def _grown(card: IndexCard, num_vectors: int) -> Configuration:
    """Give an index's kind for the items that there are now."""
    memory_bytes = round((card.memory_bytes or 0) * num_vectors / card.num_vectors)
    return Configuration(factory=card.factory, memory_bytes=memory_bytes, bits=0, is_on_disk=card.lists is not None)


def _relative(path: Path, index_path: Path) -> str:
    return str(path) if is_remote(path) else os.path.relpath(path.resolve(), index_path.resolve())
