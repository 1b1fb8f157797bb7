"""Who has the cores when: models on the CPU, or the threads that decode."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from embedcache.cores import num_cores

_FEW_CORES = 4
"""On more, a model leaves some of them idle, and decoding fills those."""


class Turns:
    """Lets decoding wait while a model computes, where both need all cores.

    On 2 cores an EfficientNet and decoding that ran at once took 6 % more time together than one after the other: they
    push each other's data out of the caches. Reading files goes on all the time.

    Args:
        device: of the models; on one of its own nobody waits.
    """

    def __init__(self, device: str) -> None:
        self._takes_turns = device == "cpu" and num_cores() <= _FEW_CORES
        self._guard = threading.Lock()
        self._num_running = 0
        self._no_model = threading.Event()
        self._no_model.set()

    @contextmanager
    def model(self) -> Iterator[None]:
        """Be a model that computes."""
        if self._takes_turns:
            self._count(1)
        try:
            yield
        finally:
            if self._takes_turns:
                self._count(-1)

    def wait(self) -> None:
        """Wait until no model computes."""
        self._no_model.wait()

    def _count(self, change: int) -> None:
        with self._guard:
            self._num_running += change
            if self._num_running:
                self._no_model.clear()
            else:
                self._no_model.set()
