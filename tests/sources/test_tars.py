import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import SourceError
from embedcache.sources.webdataset import BLOCK_BYTES, Member, iter_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CONTTYPE)
letters = st.characters(codec="utf-8", exclude_characters="/\0")
parts = st.one_of(st.text(letters, min_size=1, max_size=20), st.text("ab0._", min_size=60, max_size=130))
names = st.lists(parts, min_size=1, max_size=3).map("/".join)
files = st.tuples(names, st.integers(0, 1500), st.sampled_from(KINDS), st.sampled_from([0, 1_690_000_000.25]))


def write(entries: list[tuple[str, int, bytes, float]], form: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form]) as tar:
        for name, size, kind, mtime in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = kind, mtime if form == "pax" else int(mtime)
            info.size = size if info.isreg() else 0
            try:
                tar.addfile(info, io.BytesIO(bytes([len(name) % 256]) * info.size))
            except ValueError:  # ustar holds no longer names
                continue
    return out.getvalue()


def ours(data: bytes) -> list[Member]:
    return list(iter_members(io.BytesIO(data), "x.tar"))


def by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


@pytest.mark.slow
@given(st.lists(files, max_size=8), st.sampled_from(sorted(FORMATS)))
def test_members_equal_those_of_tarfile(entries: list[tuple[str, int, bytes, float]], form: str) -> None:
    data = write(entries, form)
    assert ours(data) == by_tarfile(data)


@pytest.mark.parametrize("magic", [b"ustar\x0000", b"ustar  \0", bytes(8)], ids=["posix", "gnu", "old"])
def test_prefix_is_read_as_by_tarfile(magic: bytes) -> None:
    """Whatever the magic says: a GNU header has times where POSIX has the prefix, and tarfile reads them as one."""
    header = bytearray(write([("name", 3, tarfile.REGTYPE, 0)], "ustar"))
    header[257:265], header[345:348] = magic, b"123"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:BLOCK_BYTES])
    assert ours(bytes(header)) == by_tarfile(bytes(header))
    assert [member.name for member in ours(bytes(header))] == ["123/name"]


@pytest.mark.slow
@given(st.lists(files, min_size=1, max_size=4), st.sampled_from(sorted(FORMATS)), st.data())
def test_truncated_tar_raises(entries: list[tuple[str, int, bytes, float]], form: str, data: st.DataObject) -> None:
    whole = write([(f"n{name}", *rest) for name, *rest in entries], form)
    end = len(whole.rstrip(b"\0")) // BLOCK_BYTES * BLOCK_BYTES  # at most the last block that is not zero
    cut = data.draw(st.integers(0, end))
    with pytest.raises(SourceError, match=r"x\.tar is not a tar, or is truncated or damaged: .*offset \d+"):
        ours(whole[:cut])


@pytest.mark.slow
@given(st.lists(files, min_size=1, max_size=4), st.sampled_from(sorted(FORMATS)), st.data())
def test_changed_byte_raises_only_source_error(
    entries: list[tuple[str, int, bytes, float]], form: str, data: st.DataObject
) -> None:
    whole = bytearray(write(entries, form))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(SourceError):
        ours(bytes(whole))


def test_binary_size_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**33 + 5  # more than 11 octal digits say
    with (tmp_path / "x.tar").open("w+b") as tar:
        tar.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.truncate(BLOCK_BYTES + 2**33 + 512 + 1024)  # a sparse file: it needs no space
        assert list(iter_members(tar, "x.tar")) == [Member("a.jpg", 512, 2**33 + 5)]


def test_negative_size_raises() -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xf0\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(SourceError, match="offset 0"):
        ours(bytes(header) + bytes(4096))


def test_sparse_file_raises() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(SourceError, match="sparse file; create the tar without --sparse"):
        ours(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
