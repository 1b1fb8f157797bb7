"""Gathering what is asked at about the same time, for one thread that answers in batches.

Answering questions that came at about the same time: one batch through each encoder, one search a filter.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from PIL.Image import Image

from embedcache.arrays import Floats
from embedcache.errors import EmbedcacheError
from embedcache.search.queries import Queries
from embedcache.search.search import Hit, OpenIndex
from embedcache.search.settings import Filter

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

WAIT_S = 0.004
MOST = 32
MOST_WAITING = 512


class BusyError(Exception):
    """Too many are waiting already."""


class Batcher(Generic[Asked, Answered]):
    """Waits a few milliseconds after the first question for others, then has all answered together by one thread.

    While that thread works, questions gather for the next batch. Whoever gave up waiting is left out of it.

    Args:
        answer_all: gives an answer, or an exception, for each question, in order; runs on the thread.
        wait_s: how long to gather.
        most: questions in a batch.
        most_waiting: questions that wait; more are refused.
    """

    def __init__(
        self,
        answer_all: Callable[[Sequence[Asked]], Sequence[Answered | Exception]],
        *,
        wait_s: float = WAIT_S,
        most: int = MOST,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._answer_all, self._wait_s, self._most, self._most_waiting = answer_all, wait_s, most, most_waiting
        self._waiting: list[tuple[Asked, asyncio.Future[Answered]]] = []
        self._is_asked = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def ask(self, question: Asked) -> Answered:
        """Get the answer to one question.

        Raises:
            BusyError: too many are waiting.
        """
        if len(self._waiting) >= self._most_waiting:
            raise BusyError
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._is_asked.set()
        return await future

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            while True:
                await self._is_asked.wait()
                if len(self._waiting) < self._most:
                    await asyncio.sleep(self._wait_s)
                await self._answer_some()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _answer_some(self) -> None:
        batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        if not self._waiting:
            self._is_asked.clear()
        batch = [(question, future) for question, future in batch if not future.done()]
        if not batch:
            return
        questions = [question for question, _ in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer_all, questions)
        except Exception as error:  # noqa: BLE001  # a bug of ours is told to all who asked, and the next batch goes on
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one visitor asks: a text, a picture or a row.

    Args:
        text: words.
        picture: RGB.
        row: of an item of the index: what is like it.
        k: hits, or as many as the filter leaves.
        keep: what may be found.
    """

    text: str | None = None
    picture: Image | None = None
    row: int | None = None
    k: int
    keep: Filter = field(default_factory=Filter)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found.

    Args:
        hits: best first; none where the filter leaves nothing.
        encode_ms: that the batch's encoders took, or reading the vectors of rows.
        search_ms: that the search and looking the hits up took, with others who asked with the same filter.
    """

    hits: Sequence[Hit]
    encode_ms: float
    search_ms: float


def answer_all(index: OpenIndex, questions: Sequence[Question]) -> list[Answer | EmbedcacheError]:
    """Answer each question, in order; one that cannot be answered gets its error, and the others their answers."""
    started = time.perf_counter()
    try:
        vectors_QP = _vectors(index, questions)
    except EmbedcacheError as error:
        return [error] * len(questions) if len(questions) == 1 else [answer_all(index, [one])[0] for one in questions]
    encode_ms = 1000 * (time.perf_counter() - started)
    places: dict[object, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        places[question.keep].append(place)
    answers: dict[int, Answer | EmbedcacheError] = {}
    for group in places.values():
        found = _find(index, vectors_QP[group], [questions[place] for place in group], encode_ms)
        answers |= dict(zip(group, found, strict=True))
    return [answers[place] for place in range(len(questions))]


def _vectors(index: OpenIndex, questions: Sequence[Question]) -> Floats:
    """Get a vector a question, in order: (Q, P)."""
    of_texts = [place for place, one in enumerate(questions) if one.text is not None]
    of_pictures = [place for place, one in enumerate(questions) if one.picture is not None]
    of_rows = [place for place, one in enumerate(questions) if one.row is not None]
    queries = Queries(
        texts=[one.text for one in questions if one.text is not None],
        images=[one.picture for one in questions if one.picture is not None],
        rows=[one.row for one in questions if one.row is not None],
    )
    found = index.query_encoder.encode(queries)
    ordered = found.copy()
    ordered[[*of_texts, *of_pictures, *of_rows]] = found
    return ordered


def _find(
    index: OpenIndex, vectors_QP: Floats, questions: Sequence[Question], encode_ms: float
) -> Sequence[Answer | EmbedcacheError]:
    started, keep = time.perf_counter(), questions[0].keep
    try:
        k = min(max(question.k for question in questions), index.count(keep))
        found: Sequence[Sequence[Hit]] = (
            index.search_vectors(vectors_QP, k=k, condition=keep) if k else [[]] * len(questions)
        )
    except EmbedcacheError as error:
        return [error] * len(questions)
    search_ms = 1000 * (time.perf_counter() - started)
    return [
        Answer(hits=hits[: question.k], encode_ms=encode_ms, search_ms=search_ms)
        for question, hits in zip(questions, found, strict=True)
    ]
