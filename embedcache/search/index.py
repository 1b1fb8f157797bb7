"""Building an index over one feature of a cache: one kind after another until one reaches the recall.

Candidate kinds are estimated by their memory, and their search parameters are tuned until the recall is reached.

Vectors are added chunk by chunk. `building.json` names the files of what was added so far, and `card.json` the files of
the finished index. A file never changes: an index that grows gets files of new names, and the rename of its card is the
moment when these take the place of the old ones. A file that neither of the two names is deleted.
"""

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, distinct, read_npy
from embedcache.dataset.vectors import Vectors
from embedcache.errors import FingerprintError, SettingError
from embedcache.files import LOCK, AnyPath, locked, relative_location, writing
from embedcache.modalities import noun
from embedcache.neighbors.knn import knn_of_blocks
from embedcache.processes import AUTO, products_on
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.provenance import check_same, prepare_folder, record_stage, write_json
from embedcache.search.faiss_index import (
    CARD,
    STATE,
    BuildState,
    IndexCard,
    RowIndex,
    check_card,
    check_factory,
    index_paths,
    make_index,
    may_hold_removed,
    read_card,
    read_index,
    read_state,
    rebuild_step,
    rows_path,
    write_card,
)
from embedcache.search.settings import IndexSettings
from embedcache.settings import merge_settings, replace_fields
from embedcache.store.arrays import ListedFile, check_file, describe_files

if TYPE_CHECKING:
    from embedcache.options import IndexOptions

_FLAT_LIMIT = 200_000  # up to this many vectors, an exact query takes tens of milliseconds on one core
_ID_BYTES = 8
_LINK_BYTES = 272  # HNSW32: 64 neighbors of 4 bytes on the lowest level, about 2 above, and 12 bytes of bookkeeping
_LIST_BYTES = 24  # where a list on disk is in its file
_MANY_LISTS = 2**14  # from here on a graph over the centroids is faster than comparing with all of them
_POINTS_PER_LIST = 39  # with fewer, FAISS warns that k-means has too few training vectors

PART_BYTES = 1_000_000_000
"""Codes of a part of an index on disk, which is in memory while vectors are added to it."""

CHECKPOINT_S = 60.0
"""Least seconds between checkpoints."""

_FILES_OF_VECTORS = ("index-*", "partial-*")
_REMOVED = "samples that the index holds were removed from the cache: adding all others again, without training"


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A kind of index for a given number of vectors."""

    factory: str
    memory_bytes: int  # of the finished index by formula
    is_on_disk: bool = False  # the inverted lists are a file, which does not count as memory


def in_memory_configurations(num_vectors: int, width: int) -> list[Configuration]:
    """Return candidates in the order to try: exact if that is fast, a graph, then ever smaller codes in lists."""
    exact = Configuration(factory="Flat", memory_bytes=num_vectors * (4 * width + _ID_BYTES))
    graph = Configuration(factory="HNSW32", memory_bytes=num_vectors * (4 * width + _LINK_BYTES + _ID_BYTES))
    coarse, coarse_bytes = _coarse_quantizer(num_vectors, width)
    candidates = [exact, graph] if num_vectors <= _FLAT_LIMIT else [graph]

    # Product codes need enough vectors to train 256 centroids each, and groups of four dimensions.
    codes = [("SQfp16", 2 * width, 0), ("SQ8", width, 8 * width), ("SQ6", width * 6 / 8, 8 * width)]
    if width % 4 == 0 and num_vectors >= 256 * _POINTS_PER_LIST:
        codes.append((f"PQ{width // 4}", width / 4, 4 * 256 * width))
    for code, vector_bytes, table_bytes in codes:
        size = round(num_vectors * (vector_bytes + 2 * _ID_BYTES)) + coarse_bytes + table_bytes
        candidates.append(Configuration(factory=f"{coarse},{code}", memory_bytes=size))
    return candidates


def on_disk_configurations(num_vectors: int, width: int) -> list[Configuration]:
    """Return the one candidate whose vectors stay on disk, as float16; centroids and rows (twice) are in memory."""
    coarse, coarse_bytes = _coarse_quantizer(num_vectors, width)
    size = num_vectors * 2 * _ID_BYTES + coarse_bytes + num_lists(num_vectors) * _LIST_BYTES
    return [Configuration(factory=f"{coarse},SQfp16", memory_bytes=size, is_on_disk=True)]


def fit_memory(candidates: Sequence[Configuration], memory_bytes: int | None) -> list[Configuration]:
    """Return the candidates that fit a memory; the `SettingError` names the smallest if none fits."""
    fitting = [candidate for candidate in candidates if memory_bytes is None or candidate.memory_bytes <= memory_bytes]
    if not fitting:
        smallest = min(candidates, key=lambda candidate: candidate.memory_bytes)
        needed_kb = math.ceil(smallest.memory_bytes / 1024)
        alternative = "" if smallest.is_on_disk else ", or leave the vectors on disk with --on-disk"
        raise SettingError(
            f"memory: expected at least {smallest.memory_bytes:,} bytes, which the smallest index of these vectors, "
            f"{smallest.factory}, takes, got {memory_bytes:,}: give --memory {needed_kb}K or more{alternative}"
        )
    return fitting


def num_lists(num_vectors: int) -> int:
    """Return the number of inverted lists for N vectors: the power of two nearest to 2 √N, with enough vectors each."""
    power = round(math.log2(2 * math.sqrt(num_vectors)))
    return int(max(1, min(2**power, num_vectors // _POINTS_PER_LIST)))


def _coarse_quantizer(num_vectors: int, width: int) -> tuple[str, int]:
    """Return the part of the factory string that finds lists, and the bytes of its centroids."""
    lists = num_lists(num_vectors)
    if lists < _MANY_LISTS:
        return f"IVF{lists}", lists * 4 * width
    return f"IVF{lists}_HNSW32", lists * (4 * width + _LINK_BYTES)


_K = 10
_NUM_QUERIES = 2000
_NUM_TIMED = 200
_NUM_TRUE = 100  # stored of the true ranking, so that results that tie with the k-th count as found too
_ROUNDING = 1e-5  # two ways of summing one cosine in float32
_PLATEAU = 0.002
_MAX_EF_SEARCH = 1024


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """Q queries with their T true nearest neighbors, best first."""

    vectors: Floats  # (Q, P) rows of length 1
    own: Ints | None  # (Q,) the row that each query itself is, which is no neighbor; None: of another modality
    scores: Floats  # (Q, M)
    rows: Ints  # (Q, M)

    @property
    def k(self) -> int:
        """Number of neighbors that count: 10, or all if there are fewer."""
        return min(_K, int(self.rows.shape[1]))

    def half(self, odd: int) -> "QuerySet":
        """Return every other query: the even ones (0) tune, the odd ones (1) measure."""
        part = slice(odd, None, 2) if len(self.vectors) > 1 else slice(None)
        own = None if self.own is None else self.own[part]
        return QuerySet(vectors=self.vectors[part], own=own, scores=self.scores[part], rows=self.rows[part])

    def search(self, index: RowIndex, parameters: Mapping[str, int]) -> Ints:
        """Search an index with all queries: rows (Q, K)."""
        if self.own is None:
            return index.search(self.vectors, self.k, parameters)[1]
        return drop_own(index.search(self.vectors, self.k + 1, parameters)[1], self.own)

    def recall(self, found_QK: Ints, k: int) -> float:
        """Return the fraction of the first k results that score no less than the true k-th; ties count as found."""
        is_near = self.scores >= self.scores[:, k - 1 : k] - _ROUNDING
        near_QM = np.where(is_near, self.rows, -2)
        hits = (found_QK[:, :k, None] == near_QM[:, None, :]).any(axis=2)
        return float(hits.mean())


def draw_query_set(vectors: Vectors, progress: Progress) -> QuerySet:
    """Draw queries and find their true neighbors.

    Queries are items of the other modality if a run gives it and the cache has it, or else the vectors themselves.

    Memory: 2,000 queries, a chunk of the feature, and 8 bytes per vector.
    """
    queries = vectors
    if vectors.other_modality is not None and vectors.cache.features(vectors.other_modality):
        queries = Vectors(
            vectors.cache.path,
            vectors.other_modality,
            run_path=vectors.run_path,
            width=vectors.width,
            device=vectors.device,
        )

    rows = np.random.default_rng(1).permutation(queries.rows)[:_NUM_QUERIES]
    # A single vector has no neighbor but itself.
    own = rows if queries is vectors and len(vectors.rows) > 1 else None
    searched = vectors.blocks("searching exactly", progress)
    return make_query_set(queries.read(rows), searched, own=own, device=vectors.device)


def make_query_set(
    queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], *, own: Ints | None, device: str = AUTO
) -> QuerySet:
    """Find the true neighbors of queries by exact search. Memory: as of `knn_of_blocks`."""
    rows, scores = knn_of_blocks(queries_QP, blocks, _NUM_TRUE, products=products_on(device))
    if own is not None:
        order = _own_last(rows, own)
        scores = np.take_along_axis(scores, order, axis=1)[:, :-1]
        rows = np.take_along_axis(rows, order, axis=1)[:, :-1]
    return QuerySet(vectors=queries_QP, own=own, scores=scores, rows=rows)


def drop_own(rows_QK: Ints, own_Q: Ints) -> Ints:
    """Drop each query's own row, or the last result if it was not found: (Q, K) -> (Q, K - 1)."""
    return np.take_along_axis(rows_QK, _own_last(rows_QK, own_Q), axis=1)[:, :-1]


def _own_last(rows_QK: Ints, own_Q: Ints) -> Ints:
    is_own: Bools = rows_QK == own_Q[:, None]
    return np.argsort(is_own, axis=1, kind="stable")


def measure_index(
    index: RowIndex, queries: QuerySet, min_recall: float, progress: Progress | None = None
) -> dict[str, Any]:
    """Tune on half of the queries to a little more than the requested recall, and measure on the other half.

    Returns the fields of `IndexCard` on recall and latency.
    """
    progress = progress or NullProgress()

    # The margin keeps the recall of the other queries from falling just below what was requested.
    parameters = tune_search(index, queries.half(0), min_recall + (1 - min_recall) / 4, progress)

    test = queries.half(1)
    rows_QK = test.search(index, parameters)
    return {
        "search": parameters,
        "recall_at_1": test.recall(rows_QK, 1),
        "recall_at_10": test.recall(rows_QK, test.k),
        "num_queries": len(test.vectors),
        "latency_ms": measure_latency_ms(index, test.vectors[:_NUM_TIMED], test.k, parameters),
    }


def measure_latency_ms(index: RowIndex, queries_QP: Floats, k: int, parameters: Mapping[str, int]) -> float:
    """Measure the median milliseconds of single queries."""
    index.search(queries_QP[:1], k, parameters)  # the first search starts threads

    seconds = []
    for query in queries_QP:
        started = time.perf_counter()
        index.search(query[None], k, parameters)
        seconds.append(time.perf_counter() - started)
    return round(1000 * float(np.median(seconds)), 4)


def tune_search(index: RowIndex, queries: QuerySet, target: float, progress: Progress | None = None) -> dict[str, int]:
    """Return the fastest search parameters that reach a recall; if none does, the fastest near the best recall."""
    progress = progress or NullProgress()
    best: tuple[float, dict[str, int]] = (-1.0, {})
    recalls: list[float] = []
    choices = parameter_choices(index)
    if len(choices) == 1:
        return choices[0]

    progress.start("tuning the search", 0, "settings")  # how many are needed is not known
    for parameters in choices:
        recalls.append(queries.recall(queries.search(index, parameters), queries.k))

        # Of equal recalls the first stays, which is the fastest.
        best = max(best, (recalls[-1], parameters), key=lambda pair: pair[0])
        progress.advance(1)

        if recalls[-1] >= target or _is_flat(recalls):
            break

    progress.finish()
    return best[1]


def parameter_choices(index: RowIndex) -> list[dict[str, int]]:
    """Return the search parameters of an index, from fast to thorough."""
    if index.is_graph:
        return [{"efSearch": ef} for ef in _doubling(16, _MAX_EF_SEARCH)]
    if not index.num_lists:
        return [{}]
    return [{"nprobe": nprobe} for nprobe in _doubling(1, index.num_lists)]


def _doubling(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] < last:
        values.append(min(2 * values[-1], last))
    return values


def _is_flat(recalls: list[float]) -> bool:
    """Return whether the last two doublings of work found nothing more; early steps may be flat at a low recall."""
    return len(recalls) > 2 and recalls[-1] > 0.5 and max(recalls) - max(recalls[:-2]) < _PLATEAU


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

    Memory: the index, a chunk of the feature, and a sample to train on. With lists on disk, also 1 GB of codes.

    Args:
        cache: path or URL of the cache.
        index: folder of the index, for its files and `card.json`.
        settings: modality, feature and run to index, and kind of the index.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: no index fits the memory, or none that fits reaches the recall. The message names one that would.
        FingerprintError: the run was trained on another encoder's features, or the folder contains another index.
        PathError: the folder contains other files.
        UnfinishedError: chunks of the feature are missing.
        DataError: the feature has several vectors per item, or no valid item.

    Example:
        >>> card = embedcache.build_index("cache", "plain-index", feature="open_example/vector")
        >>> card.num_vectors, card.width, card.factory
        (60, 48, 'Flat')
        >>> embedcache.search_index("plain-index", embedcache.Queries(keys="00003"), k=1)[0][0].key
        '00003'
    """
    settings = merge_settings(IndexSettings, settings, options)
    index = Path(index)
    progress = to_progress(progress)
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
        allowed = [LOCK, CARD, STATE, "record.json", *_FILES_OF_VECTORS]
        prepare_folder(index, kind="an index", marker=LOCK, allowed=allowed)

    # The card is read under the lock, as another process may have finished the index meanwhile.
    with locked(index):
        card = read_card(index) if (index / CARD).is_file() else None
        if card is not None:
            _check_reuse(index, card, vectors, settings)
        if card is None or _is_outdated(index, card, vectors):
            card = _build(index, vectors, card, settings, progress)
            write_card(index, card)

        # The card comes first: until it names the new files, only the state does.
        (index / STATE).unlink(missing_ok=True)
        _remove_others(index, card.files)
    return card


def _is_outdated(index_path: Path, card: IndexCard, vectors: Vectors) -> bool:
    """Return whether items were added to the cache of an index, or removed from it."""
    if card.num_vectors != len(vectors.rows):
        return True
    return may_hold_removed(card, vectors.cache) and not np.isin(_read_rows(index_path, card.files), vectors.rows).all()


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

    # The samples were compared above. The digest changes as the cache grows, so the card's digest replaces it.
    factory = settings.factory or card.factory
    source = _source(vectors, index_path)
    requested = {**source, "index_digest": card.index_digest, "factory": factory, "width": vectors.width}
    check_card(index_path, card, requested, next_step=new_folder)

    # The limit applies to the index with the items that are about to be added.
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
    """Build or extend an index up to its card, and record how."""
    source = _source(vectors, index_path)
    record = {
        **source,
        "cache": str(vectors.cache.path),
        "run": str(vectors.run_path),
        "width": vectors.width,
        "factory": settings.factory,
        "memory_bytes": settings.memory,
        "min_recall": settings.min_recall,
        "on_disk": settings.on_disk,
    }

    with record_stage(index_path / "record.json", "index", record) as outcome, writing(index_path):
        builder = _Builder(index_path, source, vectors, old, progress)
        kind, index, quality = _find_index(builder, settings)

        card = IndexCard(
            **source,
            factory=kind.factory,
            num_vectors=len(index),
            width=vectors.width,
            **quality,
            min_recall=settings.min_recall,
            memory_bytes=kind.memory_bytes or None,
            on_disk=kind.is_on_disk,
            files=builder.state.files,
        )
        outcome.update({"recall_at_10": card.recall_at_10, "num_vectors": card.num_vectors})
        if old is not None:
            outcome.update({"recall_at_10_before": old.recall_at_10, "num_vectors_before": old.num_vectors})
    return card


def _find_index(builder: "_Builder", settings: IndexSettings) -> tuple[Configuration, RowIndex, dict[str, Any]]:
    """Build one candidate after another until one reaches the recall; return it with its measured quality.

    A finished index is the only candidate, and kept below the recall if its files contain removed samples.
    """
    vectors = builder.vectors
    old = builder.card
    num = len(vectors.rows)
    candidates = _candidates(settings, num, vectors.width) if old is None else [_grown(old, num)]
    must_keep = old is not None and may_hold_removed(old, vectors.cache)

    factories = [candidate.factory for candidate in candidates]
    if builder.state.factory in factories:  # the ones before it were rejected
        candidates = candidates[factories.index(builder.state.factory) :]

    queries: QuerySet | None = None
    recalls: dict[str, float] = {}
    for candidate in candidates:
        index = builder.build(candidate)

        # All candidates are measured with the same queries, whose exact search is done once.
        queries = queries or draw_query_set(vectors, builder.progress)
        quality = measure_index(index, queries, settings.min_recall, builder.progress)
        recall = quality["recall_at_10"]
        if recall >= settings.min_recall or must_keep:
            return candidate, index, quality

        builder.progress.note(f"{candidate.factory}: recall@10 {recall:.3f} is too low, not kept")
        recalls[candidate.factory] = recall
        if not candidate.factory.startswith("HNSW"):  # the next ones have fewer bits, and miss more
            break

    builder.discard()
    factory = max(recalls, key=recalls.__getitem__)
    unchanged = "" if old is None else "; the old index is unchanged"
    larger = "leave --factory out" if settings.factory else "give more --memory, or --on-disk"
    raise SettingError(
        f"min_recall: expected an index with recall@10 of at least {settings.min_recall:g}, got "
        f"{recalls[factory]:.3f} from the best, {factory}, with its most thorough search{unchanged}; {larger}, or "
        "lower it to less than that with --min-recall"
    )


class _Builder:
    """The unfinished index in a folder, whose files `building.json` names.

    Its last FAISS index is a part in memory, to which vectors are added. While it grows, checkpoints of it are
    `partial-N.faiss`, with N vectors. Complete, it is `index-N.faiss`, with a number above those of the finished index.
    With lists on disk, a part is complete with `PART_BYTES`, and another one begins; else all vectors are one part.

    Args:
        folder: folder of the index.
        source: what the index is built from, as fields of the card.
        vectors: the vectors of these items.
        card: card of the finished index in the folder, which is extended; None if there is none.
        progress: progress in items.

    Raises:
        FingerprintError: the folder holds an unfinished index of another source; the cache may have grown since.
    """

    def __init__(
        self,
        folder: Path,
        source: Mapping[str, Any],
        vectors: Vectors,
        card: IndexCard | None,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self.vectors = vectors
        self.card = card
        self.progress = progress
        self.state = BuildState(source={**source, "width": vectors.width})
        self._complete: dict[str, ListedFile] = {}  # files of the parts before the last one
        self._is_changed = False  # whether the last part has vectors that no file has
        if not (folder / STATE).is_file():
            return

        # A cache that only gained samples has another digest, and is the same source.
        state = read_state(folder)
        stored = str(state.source.get("index_digest"))
        same_rows = {"index_digest": stored} if vectors.cache.info.has_rows_of(stored) else {}
        check_same(
            f"the unfinished index {folder}",
            state.source,
            {**self.state.source, **same_rows},
            next_step="give the path of a new folder",
        )
        self.state = replace_fields(state, source=self.state.source)

    def build(self, kind: Configuration) -> RowIndex:
        """Build an index of all valid rows, from where an interrupted build of the same kind ended.

        Raises `SettingError` if FAISS rejects the factory string, has too few vectors to train, or has no lists that
        can stay on disk.
        """
        part = self._start(kind)
        new_rows = np.setdiff1d(self.vectors.rows, self._stored_rows(part), assume_unique=True)
        is_new_N = np.zeros(self.vectors.feature.num_items, bool)
        is_new_N[new_rows] = True

        self.progress.start(f"indexing as {kind.factory}", len(new_rows), noun(self.vectors.modality))
        last_checkpoint = time.monotonic()
        writing_s = 0.0
        for number in distinct(new_rows // self.vectors.cache.info.chunk_size):
            # Only the last part is in memory, which its size bounds.
            if kind.is_on_disk and part.num_bytes >= PART_BYTES:
                self._save(part, is_complete=True)
                self._complete = dict(self.state.files)
                part.reset()

            rows, vectors_BP = self.vectors.chunk(int(number))
            is_new = is_new_N[rows]
            part.add(rows[is_new], vectors_BP[is_new])
            self._is_changed = True
            self.progress.advance(int(is_new.sum()))

            # Writing takes at most a tenth of the time.
            started = time.monotonic()
            if started - last_checkpoint >= max(CHECKPOINT_S, 10 * writing_s):
                self._save(part, is_complete=False)
                last_checkpoint = time.monotonic()
                writing_s = last_checkpoint - started if CHECKPOINT_S else 0.0

        self.progress.finish()
        self._save(part, is_complete=True)
        if not kind.is_on_disk:
            return part
        return read_index(index_paths(self.folder, self.state.files), is_mapped=True, device=self.vectors.device)

    def discard(self) -> None:
        """Delete what was built; a finished index stays as it was."""
        (self.folder / STATE).unlink()
        _remove_others(self.folder, () if self.card is None else self.card.files)

    def _start(self, kind: Configuration) -> RowIndex:
        """Return the last part that an earlier build left, or a new one that is trained and empty."""
        device = self.vectors.device
        paths = index_paths(self.folder, self.state.files)

        # An unfinished build of another kind is given up for the finished index, if there is one.
        if self.state.factory != kind.factory or (len(paths) > 1 and not kind.is_on_disk):
            files = {} if self.card is None else self.card.files
            paths = index_paths(self.folder, files)
            if not paths:
                make_index(kind.factory, self.vectors.width)  # an error of the factory string comes first
            self._write_state(factory=kind.factory, files=files)

        if not paths:
            part = make_index(kind.factory, self.vectors.width, device=device)
            self._check_lists(part, kind)
            if not part.is_trained:
                self.progress.note(f"training {kind.factory}")
                part.train(self.vectors.sample(part.num_training, progress=self.progress))
                self._save(part, is_complete=False)
            return part

        for name, file in self.state.files.items():
            if name.endswith(".npy") or self.folder / name == paths[-1]:
                check_file(self.folder / name, file.checksum, next_step=self._next_step(name))

        part = read_index(paths[-1:], device=device)
        self._check_lists(part, kind)
        part_names = {paths[-1].name, rows_path(paths[-1]).name}
        self._complete = {name: file for name, file in self.state.files.items() if name not in part_names}
        self._is_changed = not paths[-1].name.startswith("index-")

        # Removed samples cost all that was added, but not the training.
        if not np.isin(self._stored_rows(part), self.vectors.rows).all():
            self.progress.note(_REMOVED)
            self._complete = {}
            self._is_changed = True
            part.reset()

        part.resume()
        return part

    def _check_lists(self, part: RowIndex, kind: Configuration) -> None:
        if kind.is_on_disk and not part.num_lists:
            raise SettingError(
                f"factory: expected inverted lists to leave on disk, such as IVF4096,SQfp16, got {kind.factory!r}"
            )

    def _stored_rows(self, part: RowIndex) -> Ints:
        """Return the rows of the complete parts and of the last one."""
        return np.concatenate([_read_rows(self.folder, self._complete), part.rows])

    def _save(self, part: RowIndex, *, is_complete: bool) -> None:
        """Write the last part, unless its file is up to date, and record that in `building.json`."""
        if is_complete and not self._is_changed:
            return

        name = f"partial-{len(part)}.faiss"
        if is_complete:
            # A name that the finished index uses would overwrite its file.
            old_files = {} if self.card is None else self.card.files
            paths = index_paths(self.folder, {**old_files, **self._complete})
            numbers = [int(path.stem.partition("-")[2]) for path in paths]
            name = f"index-{max(numbers, default=-1) + 1}.faiss"
        # The state names a file only after it is written.
        part.write(self.folder / name)
        files = describe_files(self.folder, (name, rows_path(Path(name)).name))
        self._write_state(files={**self._complete, **files})
        self._is_changed = not is_complete

    def _write_state(self, **changes: Any) -> None:
        """Write `building.json`, then delete the files that it and the card no longer name."""
        self.state = replace_fields(self.state, **changes)
        write_json(self.folder / STATE, self.state.to_json())
        _remove_others(self.folder, [*self.state.files, *({} if self.card is None else self.card.files)])

    def _next_step(self, name: str) -> str:
        """Return what to do about a damaged file."""
        if self.card is not None and name in self.card.files:
            return rebuild_step(self.folder)
        return f"delete {self.folder / STATE} to begin again"


def _read_rows(index_path: Path, files: Iterable[str]) -> Ints:
    """Return the rows of the parts of an index, in order."""
    rows = [read_npy(rows_path(path)) for path in index_paths(index_path, files)]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _remove_others(index_path: Path, names: Collection[str]) -> None:
    """Remove the files of vectors that have other names."""
    for pattern in _FILES_OF_VECTORS:
        for path in index_path.glob(pattern):
            if path.name not in names:
                path.unlink()


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
    return Configuration(factory=card.factory, memory_bytes=memory_bytes, is_on_disk=card.on_disk)
