"""Check containers of recordings for what FFmpeg passes over: sizes in headers, checksums of pages, counts of frames.

Nothing is decoded. A size that the program did not know when it began to write, as of sound that it sends through a
pipe, announces nothing.
"""

import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal

from embedcache.errors import ItemError

__all__ = ["announced_frames", "check_container"]

_UNKNOWN = ((0, 0), (2**31 - 2**16, 2**31 + 2**16), (2**32 - 2**16, 2**32 - 1))
"""Ranges of sizes that mean "unknown": written by FFmpeg and others into pipes; in the middle by sox and arecord."""
_ROUNDED = 0.05  # fraction of a RIFF file that may be missing: some programs count more than they write
_HEAD = 12  # bytes before the first chunk: kind, size, form
_PAGE = 27  # bytes of an Ogg page before its table of segments
_FIRST_PAGE, _LAST_PAGE = 2, 4  # flags of the pages of a stream
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))  # byte -> its bits in reverse
_ID3 = 10  # bytes of the header, or the footer, of an ID3v2 tag
_XING_PLACES = (13, 21, 36)  # in a frame, after its header and the side information of one or two channels
_VBRI_PLACE = 36


def check_container(file: BinaryIO) -> None:
    """Check that a WAV, AVI, AIFF or Ogg file is whole, and the pages of Ogg intact; all other files pass.

    Reads the headers of WAV, AVI and AIFF, and all of an Ogg file.

    Args:
        file: the file; it is left at another position.

    Raises:
        ItemError: the file is empty, ends before its announced end, or has a damaged page.
    """
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise ItemError("empty file")
    file.seek(0)
    head = file.read(_HEAD)
    if head[:4] in (b"RIFF", b"RF64"):
        announced = int.from_bytes(head[4:8], "little")
        if not _is_unknown(announced) and size < (1 - _ROUNDED) * (announced + 8):
            raise _truncated(size, announced + 8)
        if head[8:] == b"WAVE":
            _check_sound_chunk(file, size, b"data", "little")
    elif head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        _check_sound_chunk(file, size, b"SSND", "big")
    elif head[:4] == b"OggS":
        _check_pages(file, size)


def _is_unknown(size: int) -> bool:
    return any(low <= size <= high for low, high in _UNKNOWN)


def _truncated(size: int, announced: int) -> ItemError:
    return ItemError(f"truncated: {size:,} bytes of {announced:,}")


def _check_sound_chunk(file: BinaryIO, size: int, name: bytes, order: Literal["little", "big"]) -> None:
    """Check that a file reaches to the end of the chunk of its samples, after which there may be others."""
    start, size_64 = _HEAD, 0
    while len(chunk := _read_at(file, start, 8)) == 8:
        num_bytes = int.from_bytes(chunk[4:], order)
        if chunk[:4] == b"ds64":  # of RF64, for WAV files above 4 GiB: size of the file, size of the samples
            size_64 = int.from_bytes(_read_at(file, start + 16, 8), "little")
        elif chunk[:4] == name:
            num_bytes = size_64 if num_bytes == 2**32 - 1 else num_bytes
            if not _is_unknown(num_bytes) and size < start + 8 + num_bytes:
                raise _truncated(size, start + 8 + num_bytes)
            return
        start += 8 + num_bytes + num_bytes % 2


def _read_at(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return file.read(num_bytes)


def _check_pages(file: BinaryIO, size: int) -> None:
    """Compare each page of an Ogg file with its checksum; bytes behind the last page, such as tags, pass.

    The last page need not be marked as such: many programs leave that out, and a recorded live stream has no end.
    """
    open_streams: set[bytes] = set()
    start = 0
    for head, body in _pages(file):
        if head[:4] != b"OggS":
            break
        page = head[:22] + bytes(4) + head[26:] + body
        if len(head) < _PAGE or len(body) < _body_size(head):
            raise ItemError(f"truncated: the last page of Ogg, from byte {start:,} on, is cut")
        if head[22:26] != _ogg_checksum(page):
            raise ItemError(f"damaged: the page of Ogg at byte {start:,} has a wrong checksum")
        stream, flags = head[14:18], head[5]
        open_streams |= {stream} if flags & _FIRST_PAGE else set()
        open_streams -= {stream} if flags & _LAST_PAGE else set()
        start += len(page)
    if start < size and open_streams:
        raise ItemError(f"damaged: expected a page of Ogg at byte {start:,}, got other bytes")


def _pages(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the header and the content of each page, as long as the file looks like one."""
    file.seek(0)
    while head := file.read(_PAGE):
        head += file.read(head[-1]) if len(head) == _PAGE else b""
        yield head, file.read(_body_size(head))


def _body_size(head: bytes) -> int:
    return sum(head[_PAGE:])


def _ogg_checksum(page: bytes) -> bytes:
    """Return the checksum of a page whose own is zero: CRC-32 as zlib computes it, but of bits in reverse, from 0."""
    reverse = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return reverse.to_bytes(4, "big").translate(_REVERSED)


def announced_frames(file: BinaryIO) -> int | None:
    """Return the number of frames that the first frame of an MP3 file announces (Xing, Info, VBRI); None without it."""
    start = 0
    while (head := _read_at(file, start, _ID3))[:3] == b"ID3" and len(head) == _ID3:
        start += _ID3 + sum((value & 127) << shift for value, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += _ID3 if head[5] & 16 else 0
    frame = _read_at(file, start, 64)
    if frame[:1] != b"\xff":
        return None
    if frame[_VBRI_PLACE:].startswith(b"VBRI"):
        return int.from_bytes(frame[_VBRI_PLACE + 14 : _VBRI_PLACE + 18], "big") or None
    for place in _XING_PLACES:
        if frame[place : place + 4] in (b"Xing", b"Info") and frame[place + 7] & 1:
            return int.from_bytes(frame[place + 8 : place + 12], "big") or None
    return None
