"""The files of a tar by its headers: names and places, without reading what is between them.

The headers are those of POSIX (ustar and pax) and GNU, 512 bytes each. What plain tars are made of is read here, some
ten times as fast as by `tarfile`; a member that has anything else (a long name, a size beyond 8 GiB) goes by it.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from embedcache.errors import SourceError
from embedcache.sources.files import check_name

BLOCK_BYTES = 512
WINDOW_BYTES = 128 * 1024
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_CHECKSUM_BLANKS = 8 * ord(" ")
_CHANGES_A_MEMBER = re.compile(rb" path=| size=|GNU\.sparse|hdrcharset")  # pax records that a header must be read with


class Member(NamedTuple):
    """One file in a tar: its name with `/`, and where its bytes are."""

    name: str
    offset: int
    length: int


class TarBytes:
    """The bytes of one tar, read in pieces and mostly forwards.

    Args:
        place: the tar's path or URL, for messages.
        size: its length in bytes.
        fetch: gives `length` bytes from `offset` on, all within the tar.
    """

    def __init__(self, place: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self.place = place
        self.size = size
        self._fetch = fetch
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """Get `length` bytes from `offset` on, or those up to the end."""
        first = offset - self._start
        if first < 0 or first + length > len(self._data):
            available = self.size - offset
            if available <= 0:
                return b""
            self._data = self._fetch(offset, min(available, max(length, WINDOW_BYTES)))
            self._start, first = offset, 0
        return self._data[first : first + length]


def members(tar: TarBytes) -> Iterator[Member]:
    """Go through the files of a tar, in order. Memory holds one piece of it.

    Raises:
        SourceError: it is no tar, or is cut short or damaged; names the offset.
    """
    offset = 0
    while (header := tar.read(offset, BLOCK_BYTES)) != _ZERO_BLOCK:
        if len(header) < BLOCK_BYTES:
            raise damaged(tar.place, f"no header at offset {offset}, where it ends")
        member, after = _plain_member(tar, offset, header) or _other_member(tar, offset)
        if after <= offset:
            raise damaged(tar.place, f"the header at offset {offset} gives no length")
        if after > tar.size:
            raise damaged(tar.place, f"the member at offset {offset} ends {after - tar.size} bytes after the file")
        offset = after
        if member is not None:
            yield member


def damaged(place: str, reason: str) -> SourceError:
    """Make the error for a tar that cannot be gone through."""
    return SourceError(f"{place} is no tar, or is cut short or damaged: {reason}; copy or make it again")


def _plain_member(tar: TarBytes, offset: int, header: bytes) -> tuple[Member, int] | None:
    """Read a file whose header says all, and where the next header is; None where `tarfile` should have a look."""
    kind = header[156:157]
    if kind == b"x":
        size = _size(header)
        if size is None or not _is_sound(header):
            return None
        records = tar.read(offset + BLOCK_BYTES, size)
        if _CHANGES_A_MEMBER.search(records):
            return None
        offset += BLOCK_BYTES + _padded(size)
        header = tar.read(offset, BLOCK_BYTES)
        kind = header[156:157]
    size = _size(header)
    name = _name(header)
    if kind not in {b"0", b"\0"} or size is None or name is None or not _is_sound(header):
        return None
    start = offset + BLOCK_BYTES
    return Member(name, start, size), start + _padded(size)


def _size(header: bytes) -> int | None:
    digits = header[124:135]
    try:
        return int(digits, 8) if digits.isdigit() and header[135:136] in {b"\0", b" "} else None
    except ValueError:  # 8 or 9
        return None


def _name(header: bytes) -> str | None:
    name = header[:100].partition(b"\0")[0]
    if header[345:346] > b"\0":
        if header[257:263] != b"ustar\0":
            return None
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    try:
        return None if name.endswith(b"/") else name.decode()
    except UnicodeDecodeError:
        return None


def _is_sound(header: bytes) -> bool:
    """Compare the checksum: the sum of the header's bytes with its own 8 taken as blanks."""
    field = header[148:156]
    try:
        said = int(field.strip(b" \0"), 8)
    except ValueError:
        return False
    sum_all = sum(header.translate(None, b"\0"))  # most are zero; without them it takes half the time
    return sum_all - sum(field) + _CHECKSUM_BLANKS == said


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _other_member(tar: TarBytes, offset: int) -> tuple[Member | None, int]:
    """Have `tarfile` read the member at an offset; None for what is no file. Also where the next header is."""
    file: Any = _TarFile(tar, offset)
    try:
        with tarfile.TarFile(fileobj=file) as one:
            info = one.next()
            after = one.offset
    except tarfile.TarError as error:
        raise damaged(tar.place, f"{error} at offset {offset}") from None
    if info is None:
        raise damaged(tar.place, f"no valid header at offset {offset}")
    if info.issparse():
        raise damaged(tar.place, f"{info.name} is a sparse file; make the tar without --sparse")
    if not info.isreg():
        return None, after
    return Member(check_name(info.name, tar.place), info.offset_data, info.size), after


class _TarFile:
    """A `TarBytes` as `tarfile` wants one."""

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
