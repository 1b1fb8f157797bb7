"""List the files of a tar from its headers, without reading the content.

Reads plain POSIX (ustar and pax) and GNU headers 6 to 9 times as fast as `tarfile`, which handles all other members,
such as those with a long name or more than 8 GiB.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from embedcache.errors import SourceError
from embedcache.sources.files import check_utf8_name

BLOCK_BYTES = 512
_WINDOW_BYTES = 128 * 1024
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_CHECKSUM_BLANKS = 8 * ord(" ")
_EXTENDED = frozenset({b"x", b"g", b"X", b"L", b"K"})
_MAX_EXTENDED_BYTES = 2**20
_OVERRIDES = re.compile(rb" path=| size=|GNU\.sparse|hdrcharset")  # pax records that override fields of the header


class Member(NamedTuple):
    """One file in a tar: its name with `/`, and the offset and length of its content in bytes."""

    name: str
    offset: int
    length: int


class TarBytes:
    """Buffered, mostly sequential reads of one tar of `size` bytes; `fetch(offset, length)` reads a part of it."""

    def __init__(self, location: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self.location = location
        self.size = size
        self._fetch = fetch
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on, or up to the end."""
        first = offset - self._start
        if first < 0 or first + length > len(self._data):
            available = self.size - offset
            if available <= 0:
                return b""
            self._data = self._fetch(offset, min(available, max(length, _WINDOW_BYTES)))
            self._start, first = offset, 0
        return self._data[first : first + length]


def iter_members(tar: TarBytes) -> Iterator[Member]:
    """Iterate over the files of a tar, in order. Memory holds one window of it. Errors name the offset."""
    offset = 0
    while (header := tar.read(offset, BLOCK_BYTES)) != _ZERO_BLOCK:
        if len(header) < BLOCK_BYTES:
            raise _damaged(tar.location, f"the file ends at offset {offset}, where a header was expected")
        member, after = _plain_member(tar, offset, header) or _other_member(tar, offset)
        if after <= offset:
            raise _damaged(tar.location, f"the header at offset {offset} has no valid size")
        if after > tar.size:
            raise _damaged(tar.location, f"the member at offset {offset} ends {after - tar.size} bytes after the file")
        offset = after
        if member is not None:
            yield member


def _damaged(location: str, reason: str) -> SourceError:
    return SourceError(f"{location} is not a tar, or is truncated or damaged: {reason}; copy or create it again")


def _plain_member(tar: TarBytes, offset: int, header: bytes) -> tuple[Member, int] | None:
    """Return a file with a plain header, and the offset of the next header; None if `tarfile` must read it."""
    kind = header[156:157]
    if kind in _EXTENDED and (_size(header) or 0) > _MAX_EXTENDED_BYTES:
        raise _damaged(tar.location, f"the extended header at offset {offset} has {_size(header):,} bytes")
    if kind == b"x":
        size = _size(header)
        if size is None or not _has_valid_checksum(header):
            return None
        records = tar.read(offset + BLOCK_BYTES, size)
        if _OVERRIDES.search(records):
            return None
        offset += BLOCK_BYTES + _padded(size)
        header = tar.read(offset, BLOCK_BYTES)
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


def _other_member(tar: TarBytes, offset: int) -> tuple[Member | None, int]:
    """Return the member at an offset as read by `tarfile`, None if it is not a file, and the next header's offset."""
    file: Any = _TarFile(tar, offset)
    try:
        with tarfile.TarFile(fileobj=file) as archive:
            info = archive.next()
            after = archive.offset
    except tarfile.TarError as error:
        raise _damaged(tar.location, f"{error} at offset {offset}") from None
    except RecursionError:  # tarfile calls itself for every extended header before a member
        raise _damaged(tar.location, f"too many extended headers at offset {offset}") from None
    if info is None:
        raise _damaged(tar.location, f"no valid header at offset {offset}")
    if info.issparse():
        raise _damaged(tar.location, f"{info.name} is a sparse file; create the tar without --sparse")
    if not info.isreg():
        return None, after
    return Member(check_utf8_name(info.name, tar.location), info.offset_data, info.size), after


class _TarFile:
    """File object over a `TarBytes`, as `tarfile` expects."""

    def __init__(self, tar: TarBytes, offset: int) -> None:
        self._tar = tar
        self._offset = offset

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, length: int) -> bytes:
        data = self._tar.read(self._offset, length)
        self._offset += len(data)
        return data
