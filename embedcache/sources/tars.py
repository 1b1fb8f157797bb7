"""Read tars: their files are listed from the headers, without reading the content, and read as ranges of bytes.

Plain POSIX (ustar and pax) and GNU headers are read 6 to 9 times as fast as by `tarfile`, which handles all other
members, such as those with a long name or more than 8 GiB. Remote files are fetched in blocks by fsspec.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

from embedcache.errors import ItemError, SourceError
from embedcache.files import is_remote, reading
from embedcache.sources.files import check_read_allowed, check_utf8_name, open_binary

BLOCK_BYTES = 512
"""Size of a block of a tar: a header is one, and content is padded to whole ones."""

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_CHECKSUM_BLANKS = 8 * ord(" ")
_OVERRIDES = re.compile(rb" path=| size=|GNU\.sparse|hdrcharset")  # pax records that override fields of the header
_MAX_REMOTE_FILES = 8
_REMOTE_BLOCK_BYTES = 8 * 2**20


class Member(NamedTuple):
    """One file in a tar: its name with `/`, and the offset and length of its content in bytes."""

    name: str
    offset: int
    length: int


def open_tar(path: Path) -> BinaryIO:
    """Open a tar to read its headers; a remote one in blocks, of which the next is fetched ahead.

    Raises:
        PathError: the web server has no range requests. Other errors are raised unchanged.
    """
    return open_binary(path, num_bytes=_REMOTE_BLOCK_BYTES, cache_type="background")


def iter_members(tar: BinaryIO, location: str) -> Iterator[Member]:
    """Iterate over the files of a tar, in order. The tar may be read elsewhere between them. Errors name the offset."""
    size = tar.seek(0, os.SEEK_END)
    offset = 0
    while (header := _read(tar, offset, BLOCK_BYTES)) != _ZERO_BLOCK:
        if len(header) < BLOCK_BYTES:
            raise _damaged(location, f"the file ends at offset {offset}, where a header was expected")
        member, after = _plain_member(tar, offset, header) or _other_member(tar, location, offset)
        if after <= offset:
            raise _damaged(location, f"the header at offset {offset} has no valid size")
        if after > size:
            raise _damaged(location, f"the member at offset {offset} ends {after - size} bytes after the file")
        offset = after
        if member is not None:
            yield member


def _read(tar: BinaryIO, offset: int, length: int) -> bytes:
    tar.seek(offset)
    return tar.read(length)


def _damaged(location: str, reason: str) -> SourceError:
    return SourceError(f"{location} is not a tar, or is truncated or damaged: {reason}; copy or create it again")


def _plain_member(tar: BinaryIO, offset: int, header: bytes) -> tuple[Member, int] | None:
    """Return a file with a plain header, and the offset of the next header; None if `tarfile` must read it."""
    kind = header[156:157]
    if kind == b"x":
        size = _size(header)
        if size is None or not _has_valid_checksum(header):
            return None
        records = _read(tar, offset + BLOCK_BYTES, size)
        if _OVERRIDES.search(records):
            return None
        offset += BLOCK_BYTES + _padded(size)
        header = _read(tar, offset, BLOCK_BYTES)
        kind = header[156:157]
    size = _size(header)
    name = _name(header)
    if kind not in {b"0", b"\0"} or size is None or name is None or not _has_valid_checksum(header):
        return None
    start = offset + BLOCK_BYTES
    return Member(name, start, size), start + _padded(size)


def _size(header: bytes) -> int | None:
    digits = header[124:135]
    try:
        return int(digits, 8) if digits.isdigit() and header[135:136] in {b"\0", b" "} else None
    except ValueError:  # a digit 8 or 9
        return None


def _name(header: bytes) -> str | None:
    name = header[:100].partition(b"\0")[0]
    if header[345:346] > b"\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    try:
        return None if name.endswith(b"/") else name.decode()
    except UnicodeDecodeError:
        return None


def _has_valid_checksum(header: bytes) -> bool:
    """Check the sum of all bytes of the header, with the 8 bytes of the checksum itself replaced by blanks."""
    field = header[148:156]
    try:
        expected = int(field.strip(b" \0"), 8)
    except ValueError:
        return False
    sum_all = sum(header.translate(None, b"\0"))  # most bytes are zero; skipping them halves the time
    return sum_all - sum(field) + _CHECKSUM_BLANKS == expected


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _other_member(tar: BinaryIO, location: str, offset: int) -> tuple[Member | None, int]:
    """Return the member at an offset as read by `tarfile`, None if it is not a file, and the next header's offset."""
    tar.seek(offset)
    try:
        with tarfile.TarFile(fileobj=tar) as archive:
            info = archive.next()
            after = archive.offset
    except (tarfile.TarError, RecursionError) as error:  # it calls itself for every extended header before a member
        raise _damaged(location, f"{error} at offset {offset}") from None
    if info is None:
        raise _damaged(location, f"no valid header at offset {offset}")
    if info.issparse():
        raise _damaged(location, f"{info.name} is a sparse file; create the tar without --sparse")
    if not info.isreg():
        return None, after
    return Member(check_utf8_name(info.name, location), info.offset_data, info.size), after


class ByteRanges:
    """Reader of byte ranges that keeps the last remote files open, with some of their blocks: a request takes long."""

    def __init__(self) -> None:
        self._open_remote = lru_cache(_MAX_REMOTE_FILES)(open_tar)
        self._lock = Lock()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Read `length` bytes of a file, starting at `offset`. Thread-safe.

        Raises:
            ItemError: the file cannot be read or is too short.
        """
        with reading(path, error_class=ItemError):
            check_read_allowed(path, length)
            if is_remote(path):
                with self._lock:
                    data = _read(self._open_remote(path), offset, length)
            else:
                with path.open("rb") as file:
                    data = _read(file, offset, length)
        if len(data) < length:
            raise ItemError(f"truncated tar: {path} ends {length - len(data)} bytes before the image does")
        return data
