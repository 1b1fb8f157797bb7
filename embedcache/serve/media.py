"""Media: images, recordings and videos of a cache as a browser shows and plays them, and images that visitors send.

Both are decoded a few at a time, on the same threads, and their memory is returned afterwards.
"""

import asyncio
import ctypes
import gc
import re
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse
from PIL.Image import Image

from embedcache.dataset.thumbnails import PLAYED, PlayedFile, Thumbnails
from embedcache.processes import cancelled_by
from embedcache.serve.batching import BusyError
from embedcache.sources.images import WHITE, decode_image
from embedcache.store.cache import Cache

_T = TypeVar("_T")

KEPT = {"Cache-Control": "private, max-age=86400"}
_THUMBNAIL_PX = 224
_IMAGE_PX = 1280
_NUM_CACHED_THUMBNAILS = 4096  # about 6 kB each
_NUM_CACHED_FILES = 4
_MAX_FILE_BYTES = 2**26
"""Largest file that is played: 35 minutes of sound."""
_MAX_PART_BYTES = 2**20
"""Largest part of a file that is sent at once, so that a player that reads slowly holds no more memory."""
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_NUM_DECODERS = 2
"""Images decoded at the same time; each may take a quarter of a gigabyte."""
_MAX_IMAGES = 4
"""Query images in memory at the same time, from decoding to the response; others wait as files."""
_MAX_FILES = 8
"""Files in memory at the same time, as a multiple of the largest one."""
_QUIET_S = 0.5


class ServedItems:
    """Items of one modality of a possibly untrusted cache; arguments and errors are those of `Thumbnails`.

    `image` and `thumbnail` return the image of the item in a row as a WebP file, and `play` the recording or video as a
    file to play; all are thread-safe. Images and recordings are decoded and encoded again, so no byte of a source's
    file reaches a browser; a video is sent as it is stored.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self.num_items, self.is_played = cache.info.num_items.get(modality, 0), modality in PLAYED
        thumbnails = Thumbnails(cache, modality)
        self.places = thumbnails.places
        self.thumbnail = lru_cache(maxsize=_NUM_CACHED_THUMBNAILS)(partial(thumbnails.webp, size_px=_THUMBNAIL_PX))
        self.image = partial(thumbnails.webp, size_px=_IMAGE_PX)
        self.play = lru_cache(maxsize=_NUM_CACHED_FILES)(partial(thumbnails.play, max_bytes=_MAX_FILE_BYTES))


def respond_with_part(file: PlayedFile, part: str | None) -> Response:
    """Return the part of a file that a player asks for with the header `Range`, at most 1 MiB; without it, all.

    A player that gets less than it asked for, or jumps to another time, sends the next request. What is no range of one
    part counts as no header, as HTTP allows; the whole file is then sent as fast as it is received.
    """
    match, size = _RANGE.fullmatch(part or ""), len(file.data)
    headers = {**KEPT, "Accept-Ranges": "bytes"}
    if match is None:
        length = {"Content-Length": str(size)}
        return StreamingResponse(_parts(file.data), media_type=file.media_type, headers={**headers, **length})
    first, last = int(match[1]), int(match[2] or size)
    if first >= size or last < first:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    stop = min(last + 1, first + _MAX_PART_BYTES, size)
    headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
    return Response(file.data[first:stop], 206, media_type=file.media_type, headers=headers)


async def _parts(data: bytes) -> AsyncIterator[bytes]:
    for first in range(0, len(data), _MAX_PART_BYTES):
        yield data[first : first + _MAX_PART_BYTES]


class ImageThreads:
    """Threads that decode items, and return freed memory to the system once they have been idle for half a second.

    A decoded image takes up to 160 MB, which the C library would otherwise keep for the next one.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="images")
        self._num_running = 0
        self._trim: asyncio.TimerHandle | None = None

    async def run(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Return the result of a call on one of the threads; it ends early, as `check_cancelled` says, if this does."""
        self._num_running += 1
        is_over = threading.Event()

        def run() -> _T:
            with cancelled_by(is_over):
                return call(*arguments)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        finally:
            is_over.set()
            self._num_running -= 1
            self.trim_later()

    def trim_later(self) -> None:
        """Return freed memory to the system soon, unless another image comes first."""
        if self._trim is not None:
            self._trim.cancel()
        self._trim = asyncio.get_running_loop().call_later(_QUIET_S, self._trim_if_idle)

    def _trim_if_idle(self) -> None:
        if not self._num_running:
            self._threads.submit(return_memory)

    def shut_down(self) -> None:
        """Stop without waiting for images in progress."""
        if self._trim is not None:
            self._trim.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def return_memory() -> None:
    """Return freed memory to the system where the C library has a function for it, as that of Linux does."""
    gc.collect()  # of what was created since the start only, see `freeze_objects`
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Uploads:
    """Query images that visitors are sending.

    An image waits for its turn only once all of its bytes have arrived, so a slow sender holds up nobody. All files
    together take at most eight times the largest one; if more arrives, the oldest that is not complete is dropped.

    Args:
        threads: threads that decode.
        max_bytes: size of the largest file.
        max_pixels: size of the largest image.
    """

    def __init__(self, threads: ImageThreads, *, max_bytes: int, max_pixels: int) -> None:
        self._threads, self._max_bytes = threads, _MAX_FILES * max_bytes
        self._decode = partial(decode_image, max_pixels=max_pixels)
        self._turn = asyncio.Semaphore(_MAX_IMAGES)
        self._files: list[_File] = []  # oldest first

    @asynccontextmanager
    async def receive(self, parts: AsyncIterator[bytes], background: str = WHITE) -> AsyncIterator[Image]:
        """Receive a file and decode it onto a color; the image must be used within the context.

        Raises:
            BusyError: other visitors send more bytes than fit into memory.
            ItemError: the bytes are not an image.
        """
        file = _File()
        self._files.append(file)
        try:
            async for part in parts:
                file.parts.append(part)
                file.num_bytes += len(part)
                self._make_room()
                if file.is_dropped:
                    raise BusyError
            file.is_complete = True
            async with self._turn:
                yield await self._threads.run(partial(self._decode, background=background), file.take())
        finally:
            self._files.remove(file)
            self._threads.trim_later()

    def _make_room(self) -> None:
        while sum(file.num_bytes for file in self._files) > self._max_bytes:
            oldest = next((file for file in self._files if not file.is_complete and not file.is_dropped), None)
            if oldest is None:
                return
            oldest.take()
            oldest.is_dropped = True


class _File:
    """The parts of a file received so far."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.num_bytes = 0
        self.is_complete = self.is_dropped = False

    def take(self) -> bytes:
        """Return the bytes and forget them."""
        data = b"".join(self.parts)
        self.parts, self.num_bytes = [], 0
        return data
