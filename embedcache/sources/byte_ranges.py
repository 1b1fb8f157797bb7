"""Thread-safe reads of byte ranges from many large files; remote files are fetched in blocks shared by all threads."""

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock

from embedcache.errors import ItemError
from embedcache.files import is_remote
from embedcache.sources.files import (
    check_read_allowed,
    file_size,
    no_range_requests,
    open_descriptor,
    remote_filesystem,
    wrap_io_errors,
)

_MAX_OPEN_FILES = 32
_PREFETCHED_BLOCKS = 2


class ByteRanges:
    """Reader of byte ranges that keeps recently used files open, and the last blocks of remote files in memory."""

    def __init__(self) -> None:
        self._open = lru_cache(_MAX_OPEN_FILES)(_OpenFile)
        self._blocks = RemoteBlocks()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Read `length` bytes of a file, starting at `offset`. Thread-safe.

        Raises:
            ItemError: the file cannot be read or is too short.
        """
        check_read_allowed(path, length)
        if is_remote(path):
            data = self._blocks.read(path, offset, length)
        else:
            with wrap_io_errors(path, ItemError):
                data = self._open(path).read(offset, length)
        if len(data) < length:
            raise ItemError(f"{path} ends {length - len(data)} bytes before the image does")
        return data


class _OpenFile:
    """A file descriptor closed with its last reference, so that eviction never closes a file during a read."""

    def __init__(self, path: Path) -> None:
        self._descriptor = open_descriptor(path)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes, or up to the end of the file; one call of `pread` returns at most 2 GiB."""
        parts: list[bytes] = []
        while length > 0 and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)


class RemoteBlocks:
    """Byte ranges of remote files, read through an LRU cache of blocks, which start at multiples of `block_bytes`.

    A request takes tens of milliseconds. Adjacent items cost one request per block, however many threads read them:
    threads wait for a block that another one fetches. After two consecutive blocks, the next ones are prefetched.
    Peak memory: `max_blocks` blocks, those in use by threads and those being prefetched.
    """

    def __init__(self, *, block_bytes: int = 8 * 2**20, max_blocks: int = 8) -> None:
        self._block_bytes = block_bytes
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = Lock()
        self._prefetcher = ThreadPoolExecutor(_PREFETCHED_BLOCKS, thread_name_prefix="block-prefetch")
        self._size = lru_cache(maxsize=4096)(_find_size)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on, or up to the end of the file. Thread-safe.

        Raises:
            ItemError: the file cannot be read; the message names the URL.
        """
        first, last = offset // self._block_bytes, (offset + length - 1) // self._block_bytes
        parts = []
        for number in range(first, last + 1):
            start = number * self._block_bytes
            parts.append(self._block(path, number)[max(0, offset - start) : offset + length - start])
        return b"".join(parts)

    def _block(self, path: Path, number: int) -> bytes:
        self._prefetch(path, number)
        block, is_new = self._entry(path, number)
        if is_new:
            self._fetch_into(block, path, number)
        return block.result()

    def _prefetch(self, path: Path, number: int) -> None:
        """Fetch the blocks after `number` in the background if the one before it is cached and the last is not."""
        name = str(path)
        with self._lock:
            if (name, number - 1) not in self._blocks or (name, number + _PREFETCHED_BLOCKS) in self._blocks:
                return
        num_blocks = -(-self._size(path) // self._block_bytes)
        for later in range(number + 1, min(number + 1 + _PREFETCHED_BLOCKS, num_blocks)):
            block, is_new = self._entry(path, later)
            if is_new:
                self._prefetcher.submit(self._fetch_into, block, path, later)

    def _entry(self, path: Path, number: int) -> tuple[Future[bytes], bool]:
        """Return the future of a block, and whether the caller has to fill it."""
        name = (str(path), number)
        with self._lock:
            is_new = name not in self._blocks
            block = self._blocks.setdefault(name, Future())
            self._blocks.move_to_end(name)
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        return block, is_new

    def _fetch_into(self, block: Future[bytes], path: Path, number: int) -> None:
        start = number * self._block_bytes
        try:
            filesystem, name = remote_filesystem(path)
            with wrap_io_errors(path, ItemError):
                data: bytes = filesystem.cat_file(name, start=start, end=start + self._block_bytes)
            if len(data) > self._block_bytes:
                raise ItemError(no_range_requests(path))
            block.set_result(data)
        except BaseException as error:
            with self._lock:  # the next read retries it
                if self._blocks.get((str(path), number)) is block:
                    del self._blocks[str(path), number]
            block.set_exception(error)
            raise


def _find_size(path: Path) -> int:
    with wrap_io_errors(path, ItemError):
        return file_size(path) or 0
