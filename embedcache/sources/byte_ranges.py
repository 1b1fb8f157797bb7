"""Ranges of bytes of many large files here or elsewhere, read from many threads.

Ranges of bytes of remote files, fetched in blocks that threads share: a request costs tens of milliseconds.
"""

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock

from embedcache.errors import ItemError
from embedcache.files import is_remote
from embedcache.sources.files import check_reach, file_size, no_parts, reading, remote_parts

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


BLOCK_BYTES = 8 * 2**20
MAX_BLOCKS = 8
_BLOCKS_AHEAD = 2


class RemoteBlocks:
    """Reads ranges of bytes through the blocks used last.

    Items that stand one after the other cost a request a block, however many threads read them: a block that one
    thread fetches is waited for by the others. Once two blocks that follow each other were asked for, those after
    them are fetched ahead. Peak memory: `max_blocks` blocks, those that threads hold and those on the way.

    Args:
        block_bytes: bytes of a request; blocks start at its multiples.
        max_blocks: blocks kept.
    """

    def __init__(self, *, block_bytes: int = BLOCK_BYTES, max_blocks: int = MAX_BLOCKS) -> None:
        self._block_bytes = block_bytes
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = Lock()
        self._ahead = ThreadPoolExecutor(_BLOCKS_AHEAD, thread_name_prefix="blocks-ahead")
        self._size = lru_cache(maxsize=4096)(self._find_size)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Get `length` bytes from `offset` on, or those up to the end of the file. Safe from many threads.

        Raises:
            ItemError: they cannot be had; names the URL.
        """
        first, last = offset // self._block_bytes, (offset + length - 1) // self._block_bytes
        parts = []
        for number in range(first, last + 1):
            start = number * self._block_bytes
            parts.append(self._block(path, number)[max(0, offset - start) : offset + length - start])
        return b"".join(parts)

    def _block(self, path: Path, number: int) -> bytes:
        if self._is_read_forwards(path, number):
            self._fetch_ahead(path, number)
        block, is_new = self._place(path, number)
        if is_new:
            self._fetch_into(block, path, number)
        return block.result()

    def _place(self, path: Path, number: int) -> tuple[Future[bytes], bool]:
        """Get the place of a block, and whether the caller has to fill it."""
        name = (str(path), number)
        with self._lock:
            is_new = name not in self._blocks
            block = self._blocks.setdefault(name, Future())
            self._blocks.move_to_end(name)
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        return block, is_new

    def _is_read_forwards(self, path: Path, number: int) -> bool:
        """Say whether the block before is there and one of those after is not."""
        with self._lock:
            return (str(path), number - 1) in self._blocks and (str(path), number + _BLOCKS_AHEAD) not in self._blocks

    def _fetch_ahead(self, path: Path, number: int) -> None:
        num_blocks = -(-self._size(path) // self._block_bytes)
        for later in range(number + 1, min(number + 1 + _BLOCKS_AHEAD, num_blocks)):
            block, is_new = self._place(path, later)
            if is_new:
                self._ahead.submit(self._fetch_into, block, path, later)

    def _find_size(self, path: Path) -> int:
        with reading(path, ItemError):
            return file_size(path) or 0

    def _fetch_into(self, block: Future[bytes], path: Path, number: int) -> None:
        try:
            block.set_result(self._fetch(path, number))
        except BaseException as error:
            with self._lock:  # asked for again, it is tried again
                if self._blocks.get((str(path), number)) is block:
                    del self._blocks[str(path), number]
            block.set_exception(error)
            raise

    def _fetch(self, path: Path, number: int) -> bytes:
        filesystem, name = remote_parts(path)
        start = number * self._block_bytes
        with reading(path, ItemError):
            data: bytes = filesystem.cat_file(name, start=start, end=start + self._block_bytes)
        if len(data) > self._block_bytes:
            raise ItemError(no_parts(path))
        return data
