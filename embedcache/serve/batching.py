"""Batching of concurrent queries: one batch per encoder and one search per filter, on one thread."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from embedcache.arrays import Floats
from embedcache.dataset.raw_items import ItemLike
from embedcache.encoders.base import Modality
from embedcache.errors import EmbedcacheError
from embedcache.search.search import Hit, OpenIndex
from embedcache.search.settings import Filter, Match

_Input = TypeVar("_Input")
_Output = TypeVar("_Output")

_WAIT_S = 0.004
_MAX_BATCH = 32
_MAX_WAITING = 512


class BusyError(Exception):
    """Too many requests are waiting."""


class Batcher(Generic[_Input, _Output]):
    """Collects requests for a few milliseconds after the first, and processes them together on one thread.

    While that thread works, requests collect for the next batch. Cancelled requests are left out of it.

    Args:
        process: returns a result or an exception for each request, in order; runs on the thread.
        wait_s: time to collect requests, in seconds.
        max_batch: requests per batch.
        max_waiting: waiting requests; more are rejected.
    """

    def __init__(
        self,
        process: Callable[[Sequence[_Input]], Sequence[_Output | Exception]],
        *,
        wait_s: float = _WAIT_S,
        max_batch: int = _MAX_BATCH,
        max_waiting: int = _MAX_WAITING,
    ) -> None:
        self._process = process
        self._wait_s = wait_s
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: list[tuple[_Input, asyncio.Future[_Output]]] = []
        self._has_requests = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def submit(self, request: _Input) -> _Output:
        """Return the result of one request. Raise `BusyError` if too many are waiting."""
        if len(self._waiting) >= self._max_waiting:
            raise BusyError
        future: asyncio.Future[_Output] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._has_requests.set()
        return await future

    async def run(self) -> None:
        """Process requests until cancelled."""
        try:
            while True:
                await self._has_requests.wait()

                # A full batch gains nothing from waiting for more requests.
                if len(self._waiting) < self._max_batch:
                    await asyncio.sleep(self._wait_s)
                await self._process_batch()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _process_batch(self) -> None:
        batch = self._waiting[: self._max_batch]
        self._waiting = self._waiting[self._max_batch :]
        if not self._waiting:
            self._has_requests.clear()

        # Requests that were cancelled while they waited cost no encoder time.
        batch = [(request, future) for request, future in batch if not future.done()]
        if not batch:
            return

        requests = [request for request, _ in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._process, requests)
        except Exception as error:  # noqa: BLE001
            # A bug is reported to all requests, and the next batch continues.
            results = [error] * len(batch)

        for (_, future), result in zip(batch, results, strict=True):
            # A request may also be cancelled while its batch is processed.
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


@dataclass(frozen=True, kw_only=True)
class SearchQuery:
    """One query for `k` hits or as many as the filter leaves: a text, an item, or the row of an indexed item.

    Args:
        item: modality, and the decoded item.
    """

    text: str | None = None
    item: tuple[Modality, ItemLike] | None = None
    row: int | None = None
    k: int
    keep: Filter = field(default_factory=Filter)
    match: Match = "vectors"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hits of one query, best first; empty if the filter leaves nothing.

    Args:
        encode_ms: time of the batch's encoders, or of reading the vectors of rows.
        search_ms: time of the search and of looking up the hits, together with other queries with the same filter.
    """

    hits: Sequence[Hit]
    encode_ms: float
    search_ms: float


def search_batch(index: OpenIndex, queries: Sequence[SearchQuery]) -> list[SearchResult | EmbedcacheError]:
    """Return the result of each query, in order. A query that fails gets its error, and the others their results."""
    started = time.perf_counter()
    try:
        vectors_QP = _encode(index, queries)
    except EmbedcacheError as error:
        if len(queries) == 1:
            return [error]

        # Processed one by one, only the query that cannot be encoded fails.
        return [search_batch(index, [query])[0] for query in queries]
    encode_ms = 1000 * (time.perf_counter() - started)

    # One search per filter and kind of match.
    positions: dict[tuple[Filter, Match], list[int]] = defaultdict(list)
    for position, query in enumerate(queries):
        positions[query.keep, query.match].append(position)
    results: dict[int, SearchResult | EmbedcacheError] = {}
    for (keep, match), group in positions.items():
        k = max(queries[position].k for position in group)
        started = time.perf_counter()
        try:
            texts = None if match == "vectors" else [str(queries[position].text) for position in group]
            batch_hits = _search(index, None if match == "words" else vectors_QP[group], texts, k, keep)
        except EmbedcacheError as error:
            results |= dict.fromkeys(group, error)
            continue

        search_ms = 1000 * (time.perf_counter() - started)
        for position, hits in zip(group, batch_hits, strict=True):
            results[position] = SearchResult(hits=hits[: queries[position].k], encode_ms=encode_ms, search_ms=search_ms)
    return [results[position] for position in range(len(queries))]


def _encode(index: OpenIndex, queries: Sequence[SearchQuery]) -> Floats:
    """Return one vector per query, in order: (Q, P). Queries that only match words get zeros."""
    words: list[int] = []
    texts: dict[int, str] = {}
    rows: dict[int, int] = {}
    items: dict[Modality, dict[int, ItemLike]] = defaultdict(dict)
    for position, query in enumerate(queries):
        if query.match == "words":
            words.append(position)
        elif query.text is not None:
            texts[position] = query.text
        elif query.item is not None:
            modality, item = query.item
            items[modality][position] = item
        elif query.row is not None:
            rows[position] = query.row

    # Each encoder gets all of its queries in one batch.
    encoder = index.query_encoder
    order = [*words, *texts]
    parts = [np.zeros((len(words), index.card.width), np.float32)]
    if texts:
        parts.append(encoder.encode_texts(list(texts.values())))
    for modality, batch in items.items():
        order += batch
        parts.append(encoder.encode_items(modality, [(modality, item) for item in batch.values()]))
    if rows:
        order += rows
        parts.append(encoder.read_rows(list(rows.values())))

    # The parts follow the kinds of queries; sorting by position restores the order of the queries.
    return np.concatenate(parts)[np.argsort(order)]


def _search(
    index: OpenIndex, vectors_QP: Floats | None, texts: Sequence[str] | None, k: int, keep: Filter
) -> Sequence[Sequence[Hit]]:
    """Search with vectors, with words if there are none, or with both."""
    # A filter may leave no item at all.
    k = min(k, index.count(keep))
    if vectors_QP is None:
        return index.search_words(texts or [], k=k, condition=keep) if k else [[]] * len(texts or [])
    return index.search_vectors(vectors_QP, k=k, condition=keep, texts=texts) if k else [[]] * len(vectors_QP)
