"""The map of an index for the page, read from the index's folder or computed once after the start, and its sample."""

import logging
import threading
from functools import cached_property

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.map import Cluster, IndexMap, compute_map, read_map, write_map
from embedcache.curate.settings import MapSettings
from embedcache.errors import EmbedcacheError, UnknownNameError
from embedcache.progress import NullProgress
from embedcache.search.search import OpenIndex
from embedcache.serve.schema import MapState

log = logging.getLogger("embedcache.serve")

_SAMPLE = 36
_QUESTIONS = 6
_LEVELS = 2**16 - 1
_NO_MAP = IndexMap(
    rows=np.empty(0, np.int64),
    points=np.empty((0, 2), np.float32),
    clusters_N=np.empty(0, np.int64),
    clusters=(),
    projection="",
    seed=0,
)


class ServedMap:
    """The map of an index. Until `load` has read or computed it, it is empty, and its state is `computing`.

    Args:
        index: the index; a computed map is written into its folder, if that can be written.
        concepts: cache of concepts that name the clusters of a computed map.
    """

    def __init__(self, index: OpenIndex, concepts: str | None = None) -> None:
        self._index = index
        self._settings = MapSettings(projection="pca", concepts=concepts, device=index.device)
        self.found = _NO_MAP
        self._stopped = threading.Event()
        self.state: MapState = "computing"
        self.reason = ""

    def load(self) -> None:
        """Read the map, or compute and store it. Does not raise, because the page works without a map."""
        if self.state == "ready":
            return

        try:
            self.found = read_map(self._index) or self._compute()
            self.state = "ready"
        except _StoppedError:
            return
        except Exception as error:
            # Also after a bug, the page says that there is no map, and goes on.
            log.warning("the map: %s", error, exc_info=not isinstance(error, EmbedcacheError))
            self.state = "unavailable"
            self.reason = "the map cannot be computed; the reason is in the server's log"

    def stop(self) -> None:
        """Stop `load` at its next step."""
        self._stopped.set()

    def _compute(self) -> IndexMap:
        progress = _StoppableProgress(self._stopped)
        computed = compute_map(self._index, self._settings, progress=progress)
        try:
            write_map(self._index, computed)
        except (EmbedcacheError, OSError) as error:
            # The folder is another user's or read-only. The map is then computed at each start.
            log.info("the map is not stored: %s", error)
        return computed

    @cached_property
    def _points(self) -> bytes:
        xs, ys = (np.rint(self.found.points * _LEVELS)).astype("<u2").T
        # The page makes a typed array of each column without copying.
        columns = (self.found.rows.astype("<u4"), xs, ys, self.found.clusters_N.astype("<u2"))
        return b"".join(np.ascontiguousarray(column).tobytes() for column in columns)

    def points(self) -> bytes:
        """Return row (uint32), x and y (uint16, of 65,535) and cluster (uint16) of all items, column by column.

        10 bytes per item, little-endian; rows ascend.
        """
        if self.state != "ready":
            raise UnknownNameError("there is no map yet; GET /api/map says why")
        return self._points

    def sample(self) -> Ints:
        """Return rows of items from as many different clusters as there are: (S,) int64."""
        return self.found.sample(_SAMPLE) if len(self.found.rows) else self.found.rows

    def questions(self) -> list[str]:
        """Return captions of items near the centers of some clusters, as examples of a query."""
        questions = dict.fromkeys(cluster.question for cluster in self.found.clusters if cluster.question)
        return list(questions)[:_QUESTIONS]

    def cluster(self, number: int) -> Cluster:
        """Return a cluster, or raise an UnknownNameError."""
        if number >= len(self.found.clusters):
            raise UnknownNameError(f"unknown cluster {number}; GET /api/map lists the known ones")
        return self.found.clusters[number]


class _StoppedError(Exception):
    """The server ends."""


class _StoppableProgress(NullProgress):
    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def advance(self, count: int) -> None:  # noqa: ARG002
        """End the computation if the server does."""
        if self._stopped.is_set():
            raise _StoppedError
