"""Gathering what is asked at about the same time, for one thread that answers in batches."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

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
