"""Tables as they are written and read: groups of rows, batches, parts that replace others, and checksums."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError, SourceError
from embedcache.sources import FileItem, Sample
from embedcache.store import tables
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.store.tables import (
    Table,
    TableWriter,
    add_checksum,
    read_table,
    relocate,
    rewrite_parts,
    without_items,
    without_samples,
)
from tests.edits import table_file
from tests.extract.cases import tree
from tests.recorded import RecordedProgress
from tests.store.test_indexing import Rows, rows


def group_rows(path: Path) -> list[int]:
    """Return the number of rows of each row group."""
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def test_files_do_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ITEM_BLOCK", 4)
    index(rows(10), tmp_path / "whole", chunk_size=5)
    assert group_rows(table_file(tmp_path / "whole", "image")) == [4, 4, 2]
    assert group_rows(table_file(tmp_path / "whole", "text")) == [4, 4, 1]
    monkeypatch.setattr("embedcache.store.indexing.BATCH", 3)
    progress = RecordedProgress()
    index(rows(10), tmp_path / "batches", chunk_size=5, progress=progress)
    assert (progress.started, progress.advances) == ([("indexing", 0, "samples")], [3, 3, 3, 1])
    whole, batches = tree(tmp_path / "whole"), tree(tmp_path / "batches")
    names = ("image/items-0.parquet", "text/items-0.parquet")
    assert [batches[name] for name in names] == [whole[name] for name in names]
    assert Cache(tmp_path / "batches").samples.equals(Cache(tmp_path / "whole").samples)


def test_rewritten_files_lack_what_was_removed_and_have_what_moved(tmp_path: Path) -> None:
    removed, info = np.array([0, 3, 4, 7, 9]), index(rows(10), tmp_path / "c", chunk_size=4)
    folder = tmp_path / "d"
    item = FileItem(path="", offset=7, length=70)
    moved = partial(relocate, relocated={2: item, 8: item})
    edits: dict[str, Callable[[pa.Table, int], pa.Table]] = {
        "samples": partial(without_samples, removed=removed),
        "image": lambda table, first_row: moved(without_items(table, removed), first_row),
        "text": lambda table, _: without_items(table, removed),
    }
    changed = dict.fromkeys(edits, np.array([0, 2]))
    (part,) = rewrite_parts(tmp_path / "c", info, folder, changed, edits)
    assert [file.name.count("-0.1.") for file in part.tables.values()] == [1, 1, 1]
    written = {name: read_table(folder / file.name).to_pydict() for name, file in part.tables.items()}
    outside = dict.fromkeys(edits, np.array([10]))
    assert list(rewrite_parts(tmp_path / "c", info, folder, outside, edits)) == [*info.parts]

    samples, images, texts = written["samples"], written["image"], written["text"]
    assert samples["key"] == [f"removed-{row}" if row in removed else f"k{row}" for row in range(10)]
    assert samples["label"] == [row if row % 2 and row not in removed else None for row in range(10)]
    assert images["path"] == ["" if row in removed else f"{row}.png" for row in range(10)]
    lengths = [0 if row in removed else row for row in range(10)]
    assert images["length"] == [70 if row in (2, 8) else lengths[row] for row in range(10)]
    assert texts["sample"] == [1, 2, 2, 4, 5, 5, 7, 8, 8]
    kept = [f"t{row}.{part}" for row in range(10) for part in range(row % 3)]
    assert texts["text"] == ["" if row in removed else text for row, text in zip(texts["sample"], kept, strict=True)]
    assert texts["language"] == [None if row in removed else "en" for row in texts["sample"]]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("abca", "'a' is the key of rows 0 and 3 (1 such keys); rename a file"),
        ("abcbcbd", "'b' is the key of rows 1 and 3 (2 such keys); rename a file"),
    ],
)
def test_keys_must_be_unique(tmp_path: Path, keys: str, words: str) -> None:
    with pytest.raises(SourceError) as raised:
        index(Rows([Sample(key=key) for key in keys]), tmp_path / "c")
    assert f"keys must be unique; {words}" in str(raised.value)
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 3], [1, None, 3]),
        ([1, None, "b"], ["1", None, "b"]),
        ([2**70, 1, None], [str(2**70), "1", None]),
        ([[1, 2], None, []], [[1, 2], None, []]),
    ],
)
def test_columns_of_mixed_types_are_texts(tmp_path: Path, values: list[object], expected: list[object]) -> None:
    index(Rows([Sample(key=f"k{n}", columns={"x": value}) for n, value in enumerate(values)]), tmp_path / "c")
    assert Cache(tmp_path / "c").column("x").to_pylist() == expected


def test_columns_that_change_their_type_between_batches_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.store.indexing.BATCH", 2)
    samples = [Sample(key=f"k{number}", columns={"x": value}) for number, value in enumerate([1, 2, "b", "c"])]
    with pytest.raises(SourceError, match="a column of the source changes its type between samples: .*x"):
        index(Rows(samples), tmp_path / "c")


@pytest.mark.parametrize("num_groups", [1, 500])
def test_any_changed_byte_of_a_single_table_is_found(tmp_path: Path, num_groups: int) -> None:
    """Also one of its footer, where Arrow would end the process; a change of the checksum itself changes nothing."""
    path, table = tmp_path / "t.parquet", pa.table({"key": [f"k{row}" for row in range(num_groups)]})
    pq.write_table(table, path, row_group_size=1)
    bare = path.read_bytes()
    add_checksum(path)
    data, length = path.read_bytes(), int.from_bytes(bare[-8:-4], "little") + 8
    checksum = f"crc32c of the rest {google_crc32c.value(bare):08x}".encode()
    assert data == bare[:-length] + checksum + bare[-length:]
    assert read_table(path).equals(table)
    assert pq.read_table(path).equals(table)
    for place in range(0, len(data) - 8, 1 if num_groups == 1 else 997):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            assert read_table(path).equals(table)
            assert len(bare) - length <= place < len(bare) - length + len(checksum)
        except pa.ArrowInvalid:
            pass


def test_any_changed_byte_of_a_table_is_found(tmp_path: Path) -> None:
    index(rows(10), tmp_path / "c", chunk_size=4)
    for name in ("samples", "image", "text"):
        path = table_file(tmp_path / "c", name)
        data = path.read_bytes()
        for place in range(0, len(data), 97):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(CorruptError, match=f"{path}: expected checksum .*; restore the file"):
                Cache(tmp_path / "c").table(name)
        path.write_bytes(data)
        assert len(Cache(tmp_path / "c").table(name))


def test_key_of_an_earlier_part_is_refused(tmp_path: Path) -> None:
    before = index(Rows([Sample(key=key) for key in "abc"]), tmp_path / "c")
    writer = TableWriter(tmp_path / "d", 1, 3)
    writer.add([Sample(key=key) for key in "dbe"])
    with pytest.raises(SourceError, match="keys must be unique; 'b' is the key of row 1 and of a new sample"):
        writer.close("", Table(tmp_path / "c", before.files("samples")))
