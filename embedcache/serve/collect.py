"""Selections of the items that visitors collect, to download or to write to the file that the operator named."""

import logging
import tempfile
import threading
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import DataError, DiskFullError, PathError, UnknownNameError
from embedcache.provenance import check_table_output
from embedcache.search.search import OpenIndex

log = logging.getLogger("embedcache.serve")

DOWNLOAD_NAME = "selection.parquet"


class SelectionWriter:
    """Writes selections of the samples of collected items. It is thread-safe.

    Args:
        index: the index of the items.
        path: the only file that `save` writes. If None, nothing is saved.

    Raises:
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """

    def __init__(self, index: OpenIndex, path: Path | None = None) -> None:
        self.path = path
        self._index = index
        self._lock = threading.Lock()
        if path is not None:
            check_table_output("selection", path)

    def encode(self, rows_K: Ints) -> bytes:
        """Return the bytes of a selection of the samples of some items, (K,) rows in any order."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / DOWNLOAD_NAME
            self._write(path, rows_K)
            return path.read_bytes()

    def save(self, rows_K: Ints) -> tuple[str, int]:
        """Write the selection of the samples of some items to `path`. Return its name and the number of samples.

        Raises:
            UnknownNameError: there is no path.
            PathError: the file exists and may not be replaced, or cannot be written.
        """
        if self.path is None:
            raise UnknownNameError("this server saves no selection; start it with --collect FILE, or download it")

        with self._lock:
            try:
                return self.path.name, self._write(self.path, rows_K)
            except (PathError, DiskFullError) as error:
                # The message may contain folders of this machine.
                log.warning("%s", error)
                raise PathError(
                    f"{self.path.name} exists or cannot be written; download the selection, or restart the server "
                    "with --overwrite"
                ) from error

    def _write(self, path: Path, rows_K: Ints) -> int:
        cache = self._index.cache
        modality = self._index.card.modality
        if not len(rows_K) or rows_K.max() >= cache.num_rows(modality):
            raise DataError(f"expected rows of collected items below {cache.num_rows(modality):,}, got others or none")

        samples = np.unique(self._index.hits.samples(rows_K))

        # Visitors do not see the folders of this machine: the cache is named without them, and by its digest.
        names = [cache.path.resolve().name]
        about = {"method": "collect", "modality": modality, "num_items": len(rows_K), "caches": names}
        write_selection(path, cache, Selection(rows=samples), about)
        return len(samples)
