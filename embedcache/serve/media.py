"""Media as a browser shows and plays them, and files that visitors send. Both are decoded a few at a time."""

import asyncio
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse

from embedcache.dataset.thumbnails import PLAYED, PlayedFile, Thumbnails
from embedcache.processes import cancelled_by
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


class ServedItems:
    """Items of one modality of a possibly untrusted cache. Arguments and errors are those of `Thumbnails`.

    `image` and `thumbnail` return the image of the item in a row as a WebP file, and `play` the recording or video as a
    file to play. All are thread-safe. Images and recordings are decoded and encoded again, so no byte of a source's
    file reaches a browser. A video is sent as it is stored.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self.num_items = cache.info.num_items.get(modality, 0)
        self.is_played = modality in PLAYED
        thumbnails = Thumbnails(cache, modality)
        self.places = thumbnails.places
        self.thumbnail = lru_cache(maxsize=_NUM_CACHED_THUMBNAILS)(partial(thumbnails.webp, size_px=_THUMBNAIL_PX))
        self.image = partial(thumbnails.webp, size_px=_IMAGE_PX)

        # A player sends many requests for parts of one file.
        self.play = lru_cache(maxsize=_NUM_CACHED_FILES)(partial(thumbnails.play, max_bytes=_MAX_FILE_BYTES))


def respond_with_part(file: PlayedFile, part: str | None) -> Response:
    """Return the part of a file that a player asks for with the header `Range`, at most 1 MiB. Without it, return all.

    A player that gets less than it asked for, or jumps to another time, sends the next request. A header that is not a
    range of one part counts as no header, as HTTP allows. The whole file is then sent as fast as it is received.
    """
    match = _RANGE.fullmatch(part or "")
    size = len(file.data)
    headers = {**KEPT, "Accept-Ranges": "bytes"}
    if match is None:
        headers["Content-Length"] = str(size)
        return StreamingResponse(_parts(file.data), media_type=file.media_type, headers=headers)

    first = int(match[1])
    last = int(match[2] or size)
    if first >= size or last < first:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})

    stop = min(last + 1, first + _MAX_PART_BYTES, size)
    headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
    return Response(file.data[first:stop], 206, media_type=file.media_type, headers=headers)


async def _parts(data: bytes) -> AsyncIterator[bytes]:
    for first in range(0, len(data), _MAX_PART_BYTES):
        yield data[first : first + _MAX_PART_BYTES]


class Decoders:
    """Decodes a few items at a time, each on a thread; the others wait."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(_NUM_DECODERS)
        # Decoded items that wait for their search also take memory.
        self.queries = asyncio.Semaphore(_NUM_DECODERS)

    async def run(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Return the result of a call on a thread. If this is cancelled, the call ends early; see `check_cancelled`."""
        is_over = threading.Event()

        def run() -> _T:
            with cancelled_by(is_over):
                return call(*arguments)

        try:
            async with self._turn:
                return await asyncio.to_thread(run)
        finally:
            is_over.set()


@asynccontextmanager
async def receive_item(
    parts: AsyncIterator[bytes], decoders: Decoders, decode: Callable[[bytes], _T]
) -> AsyncIterator[_T]:
    """Receive a file and decode it. Raise `ItemError` if the bytes are not one of its modality.

    An item is decoded only once all of its bytes have arrived, and until then they wait on disk. A slow sender thus
    holds up nobody, and needs 1 MiB of memory.
    """
    with tempfile.SpooledTemporaryFile(max_size=_MAX_PART_BYTES) as file:
        async for part in parts:
            file.write(part)
        file.seek(0)

        # Entered after the last byte, so that a slow sender takes no turn.
        async with decoders.queries:
            yield await decoders.run(lambda: decode(file.read()))
