"""A gate that keeps decoding from slowing down a model on the same few cores."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from embedcache.processes import num_cores

_FEW_CORES = 4
"""With more cores a model leaves some of them idle, and decoding uses those."""


class CpuGate:
    """Makes decoding wait while a model computes, where both would need all cores.

    On 2 cores, an EfficientNet and decoding at the same time took 6% longer than in sequence, because they
    evict each other's data from the CPU caches. Reading files never waits. The gate of another device stays open, and
    that of a model with fewer threads than cores, as `OMP_NUM_THREADS` may set: decoding uses the others.

    Args:
        cores: number of cores that this process may use; None for all.
    """

    def __init__(self, device: str, *, cores: int | None = None) -> None:
        import torch  # takes seconds, and has been imported where an encoder is open

        uses_all = torch.get_num_threads() >= (cores or num_cores())
        self._is_needed = device == "cpu" and num_cores() <= _FEW_CORES and uses_all
        self._guard = threading.Lock()
        self._num_running = 0
        self._open = threading.Event()
        self._open.set()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Keep the gate closed while a model runs."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def wait(self) -> None:
        """Wait until no model runs."""
        self._open.wait()

    def _count(self, change: int) -> None:
        with self._guard:
            self._num_running += change
            if self._num_running and self._is_needed:
                self._open.clear()
            else:
                self._open.set()
