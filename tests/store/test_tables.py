"""Tables as they are written and read: groups of rows, batches, copies, digests, and checksums of blocks."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError, SourceError
from embedcache.provenance import digest
from embedcache.sources import FileItem, Sample
from embedcache.store import table_writer, tables
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.store.layout import items_path, samples_path
from embedcache.store.table_writer import TableWriter
from embedcache.store.tables import (
    TableChecksums,
    TableDigest,
    add_footer_checksum,
    column_checksum,
    read_footer,
    read_table,
    write_table,
)
from tests.edits import write_rows
from tests.extract.cases import tree
from tests.recorded import RecordedProgress
from tests.store.test_indexing import Rows, rows


def group_rows(path: Path) -> list[int]:
    """Return the number of rows of each row group."""
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


@pytest.mark.parametrize(
    ("chunk_size", "images", "texts"), [(4, [4, 4, 2], [4, 4, 1]), (5, [5, 5], [5, 4]), (99, [10], [9])]
)
def test_a_row_group_holds_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_size: int, images: list[int], texts: list[int]
) -> None:
    index(rows(10), tmp_path / "whole", chunk_size=chunk_size)
    assert group_rows(items_path(tmp_path / "whole", "image")) == images
    assert group_rows(items_path(tmp_path / "whole", "text")) == texts
    monkeypatch.setattr("embedcache.store.changes.BATCH", 3)
    progress = RecordedProgress()
    index(rows(10), tmp_path / "batches", chunk_size=chunk_size, progress=progress)
    assert (progress.started, progress.advances) == ([("indexing", 0, "samples")], [3, 3, 3, 1])
    whole, batches = tree(tmp_path / "whole"), tree(tmp_path / "batches")
    names = ("cache.json", "image/items.parquet", "text/items.parquet")
    assert [batches[name] for name in names] == [whole[name] for name in names]
    assert Cache(tmp_path / "batches").samples.equals(Cache(tmp_path / "whole").samples)


@pytest.mark.parametrize("batch", [4, 100])
def test_copy_blanks_what_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr("embedcache.store.table_writer.BATCH", batch)
    removed, info = np.array([0, 3, 4, 7, 9]), index(rows(10), tmp_path / "c", chunk_size=4)
    writer, moved = TableWriter(tmp_path / "d", 4), FileItem(path="", offset=7, length=70)
    writer.copy(tmp_path / "c", 10, {"image": {3: moved, 4: moved, 8: moved}}, info.table_checksums, removed=removed)
    assert writer.close().num_items == info.num_items
    samples = read_table(samples_path(tmp_path / "d")).to_pydict()
    assert samples["key"] == [f"removed-{row}" if row in removed else f"k{row}" for row in range(10)]
    assert samples["label"] == [row if row % 2 and row not in removed else None for row in range(10)]
    images = read_table(items_path(tmp_path / "d", "image")).to_pydict()
    assert images["path"] == ["" if row in removed else f"{row}.png" for row in range(10)]
    lengths = [0 if row in removed else row for row in range(10)]
    assert images["length"] == [70 if row in (3, 4, 8) else lengths[row] for row in range(10)]
    texts = read_table(items_path(tmp_path / "d", "text")).to_pydict()
    assert texts["sample"] == [1, 2, 2, 4, 5, 5, 7, 8, 8]
    kept = [f"t{row}.{part}" for row in range(10) for part in range(row % 3)]
    assert texts["text"] == ["" if row in removed else text for row, text in zip(texts["sample"], kept, strict=True)]
    assert texts["language"] == [None if row in removed else "en" for row in texts["sample"]]


def test_copy_of_longer_tables_is_that_of_their_first_rows(tmp_path: Path) -> None:
    """As a killed `--extend` leaves them: rows that `cache.json` does not count, and columns of theirs."""
    longer = rows(10)
    longer.rows[8] = replace(longer.rows[8], columns={"added": 1.5})
    index(longer, tmp_path / "longer", chunk_size=4)
    info = index(rows(6), tmp_path / "c", chunk_size=4)
    writer = TableWriter(tmp_path / "d", 4)
    writer.copy(tmp_path / "longer", 6, {}, info.table_checksums)
    tables = writer.close()
    assert (writer.num_samples, tables.num_items) == (6, info.num_items)
    assert tables.digests == info.table_digests
    assert {name: tables.checksums[name] for name in ("image", "text")} == {
        name: info.table_checksums[name] for name in ("image", "text")
    }
    for name in ("image", "text"):
        assert read_table(items_path(tmp_path / "d", name)).equals(read_table(items_path(tmp_path / "c", name)))


@pytest.mark.parametrize("name", ["samples.parquet", "text/items.parquet"])
def test_copy_of_changed_tables_raises(tmp_path: Path, name: str) -> None:
    info, path = index(rows(6), tmp_path / "c", chunk_size=4), tmp_path / "c" / name
    table, column = read_table(path), "split" if name.startswith("samples") else "text"
    place = table.schema.get_field_index(column)
    write_rows(path, table.set_column(place, column, pa.array(["x"] * len(table))), row_group_size=4)
    expected = f"{path}: column '{column}' has changed since it was written; restore the file, or extract into a new"
    with pytest.raises(CorruptError, match=expected):
        TableWriter(tmp_path / "d", 4).copy(tmp_path / "c", 6, {}, info.table_checksums)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("abca", "'a' is the key of rows 0 and 3 (1 such keys); rename a file"),
        ("abcbcbd", "'b' is the key of rows 1 and 3 (2 such keys); rename a file"),
    ],
)
@pytest.mark.parametrize("hashes", ["own", "equal", "pairs"])
def test_keys_must_be_unique(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str, words: str, hashes: str
) -> None:
    if hashes != "own":
        number = {"equal": lambda _: 7, "pairs": lambda key: ord(key) // 2}[hashes]
        monkeypatch.setattr(table_writer, "hash", number, raising=False)
        index(Rows([Sample(key=key) for key in "abcdefg"]), tmp_path / "unique")
    with pytest.raises(SourceError) as raised:
        index(Rows([Sample(key=key) for key in keys]), tmp_path / "c")
    assert f"keys must be unique; {words}" in str(raised.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 3], pa.array([1, None, 3])),
        ([1, None, "b"], pa.array(["1", None, "b"])),
        ([2**70, 1, None], pa.array([str(2**70), "1", None])),
        ([[1, 2], None, []], pa.array([[1, 2], None, []])),
    ],
)
def test_columns_of_mixed_types_are_texts(tmp_path: Path, values: list[object], expected: pa.Array) -> None:
    index(Rows([Sample(key=f"k{n}", columns={"x": value}) for n, value in enumerate(values)]), tmp_path / "c")
    assert Cache(tmp_path / "c").column("x").combine_chunks().equals(expected)


def test_columns_that_change_their_type_between_batches_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.store.changes.BATCH", 2)
    samples = [Sample(key=f"k{number}", columns={"x": value}) for number, value in enumerate([1, 2, "b", "c"])]
    with pytest.raises(SourceError, match="a column of the source changes its type between samples: .*x"):
        index(Rows(samples), tmp_path / "c")


@pytest.mark.parametrize("num_rows", [1, 4, 7, 8, 9])
@pytest.mark.parametrize("step", [1, 3, 9])
def test_checksums_and_digests_do_not_depend_on_batches(num_rows: int, step: int) -> None:
    table = pa.table(
        {
            "i": pa.array([7 * row for row in range(num_rows)], pa.int64()),
            "f": pa.array([None if row % 3 else row / 4 for row in range(num_rows)], pa.float64()),
            "t": pa.array([None if row % 2 else "é" * row for row in range(num_rows)], pa.string()),
        }
    )
    checksums, batches, whole = TableChecksums(4), TableDigest(), TableDigest()
    for start in range(0, num_rows, step):
        checksums.update(table.slice(start, step))
        batches.update(table.slice(start, step))
    whole.update(table)
    assert batches.hexdigest() == whole.hexdigest()
    blocks = [table.slice(start, 4) for start in range(0, num_rows, 4)]
    expected = {name: "".join(column_checksum(block[name]) for block in blocks) for name in table.column_names}
    assert checksums.close() == expected
    assert TableChecksums(4).close() == {}


def test_digest_of_a_table_is_that_of_its_values() -> None:
    table = pa.table(
        {
            "i": pa.array([1, -2], pa.int64()),
            "f": pa.array([0.5, None], pa.float64()),
            "t": pa.array(["é", None], pa.string()),
        }
    )
    columns = {"i": np.array([1, -2], "<i8"), "f": np.array([0.5, np.nan], "<f8"), "t": "é\0\1\0".encode()}
    found = TableDigest()
    found.update(table)
    assert found.hexdigest() == digest({name: sha256(bytes(data)).hexdigest() for name, data in columns.items()})


@pytest.mark.parametrize(
    ("values", "data"),
    [
        (pa.array(["é", None, "b"], pa.large_string()), np.array([2, 0, 1], "<i8").tobytes() + "éb".encode()),
        (pa.array([b"xy", b"", b"z"], pa.binary()), np.array([2, 0, 1], "<i8").tobytes() + b"xyz"),
        (pa.array([b"xy", b"z", None], pa.large_binary()), np.array([2, 1, 0], "<i8").tobytes() + b"xyz"),
        (pa.nulls(3, pa.string()), bytes(24)),
        (pa.array([0.5, None, 3], pa.float32()), np.array([0.5, 0, 3], "<f8").tobytes()),
        (pa.array([1, None, 3], pa.int8()), np.array([1, 0, 3], "<i8").tobytes()),
    ],
)
def test_checksums_do_not_depend_on_the_width_of_a_type(values: pa.Array, data: bytes) -> None:
    is_valid = np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).tobytes()
    assert column_checksum(pa.chunked_array([values])) == f"{google_crc32c.value(is_valid + data):08x}"
    longer = pa.concat_arrays([values.slice(1), values])
    assert column_checksum(pa.chunked_array([longer.slice(2)])) == column_checksum(pa.chunked_array([values]))


@pytest.mark.parametrize("num_groups", [1, 500])
def test_footer_that_differs_from_its_checksum_is_not_parsed(tmp_path: Path, num_groups: int) -> None:
    """Arrow would end the process where it looks at a damaged column; with 500 groups, the footer is above 64 KiB."""
    path, table = tmp_path / "t.parquet", pa.table({"key": [f"k{row}" for row in range(num_groups)]})
    pq.write_table(table, path, row_group_size=1)
    bare = path.read_bytes()
    with pytest.raises(pa.ArrowInvalid, match="its footer has no checksum"):
        read_footer(path)
    add_footer_checksum(path)
    data, length = path.read_bytes(), int.from_bytes(bare[-8:-4], "little") + 8
    checksum = f"footer crc32c {google_crc32c.value(bare[-length:]):08x}".encode()
    assert data == bare[:-length] + checksum + bare[-length:]
    assert read_footer(path).num_rows == num_groups
    assert pq.read_table(path).equals(table)
    for place in range(len(data) - length - 8, len(data), 1 if num_groups == 1 else 997):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises((pa.ArrowInvalid, OSError)):
            read_table(path)


def test_tables_of_a_cache_have_checksums_of_their_footers(tmp_path: Path) -> None:
    index(rows(10), tmp_path / "c", chunk_size=4)
    for path in (samples_path(tmp_path / "c"), items_path(tmp_path / "c", "image"), items_path(tmp_path / "c", "text")):
        read_footer(path)
        data = path.read_bytes()
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 4]) + data[-19:])
    opened = Cache(tmp_path / "c")
    for name in ("samples", "image", "text"):
        with pytest.raises(CorruptError, match=r"parquet cannot be read: its footer has changed since it was written;"):
            opened.block(name, 0)


def test_table_that_is_replaced_while_it_is_opened_is_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = pa.table({"key": ["a", "b"]}), pa.table({"key": ["a", "b", "c" * 1000], "width": [1, 2, 3]})
    write_table(tmp_path / "old.parquet", old)
    write_table(tmp_path / "new.parquet", new)
    parse = tables._parse_footer

    def replacing(file: BinaryIO) -> pq.FileMetaData:
        footer = parse(file)
        (tmp_path / "new.parquet").replace(tmp_path / "old.parquet")
        return footer

    monkeypatch.setattr(tables, "_parse_footer", replacing)
    assert read_table(tmp_path / "old.parquet").equals(old)
