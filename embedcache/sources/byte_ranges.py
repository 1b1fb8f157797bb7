"""Ranges of bytes of many large files here or elsewhere, read from many threads."""

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from embedcache.errors import ItemError
from embedcache.paths import is_remote
from embedcache.sources.reading import check_reach, reading
from embedcache.sources.remote_blocks import RemoteBlocks

MAX_OPEN_FILES = 32


class ByteRanges:
    """Reads ranges of bytes; keeps the files used last open, and of remote ones a few blocks.

    Args:
        max_open: files kept open. A thread in the middle of a read holds its own one besides.
    """

    def __init__(self, max_open: int = MAX_OPEN_FILES) -> None:
        self._max_open = max_open
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = Lock()
        self._blocks = RemoteBlocks()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Get `length` bytes of a file from `offset` on. Safe from many threads.

        Raises:
            ItemError: the file is gone, cannot be read or is shorter than that.
        """
        check_reach(path, length)
        if is_remote(path):
            data = self._blocks.read(path, offset, length)
        else:
            with reading(path, ItemError):
                data = self._file(path).read(offset, length)
        if len(data) < length:
            raise ItemError(f"{path} ends {length - len(data)} bytes before the image does")
        return data

    def _file(self, path: Path) -> "_OpenFile":
        with self._lock:
            if path not in self._open:
                self._open[path] = _OpenFile(path)
            self._open.move_to_end(path)
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return self._open[path]


class _OpenFile:
    """A descriptor that closes when nobody holds it: a file dropped while another thread reads it stays open."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Read until `length` bytes are there or the file ends (one call gives at most 2 GiB)."""
        parts: list[bytes] = []
        while length > 0 and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)
