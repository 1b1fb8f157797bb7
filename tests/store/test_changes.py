"""A source that changed since a cache numbered it: what is taken in, what is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Array
from embedcache.errors import CorruptError, FingerprintError
from embedcache.sources import FileItem, Sample, TextItem
from embedcache.store.cache import Cache
from embedcache.store.feature import create_group
from embedcache.store.indexing import find_changes, index
from embedcache.store.layout import read_info
from embedcache.store.writer import add_feature, commit_chunk
from tests.edits import flip
from tests.recorded import RecordedProgress
from tests.store.test_indexing import CountedRows, Rows, rows

CHUNK = 4


def begin(path: Path, source: Rows, *, failed: tuple[int, ...] = (), encoder: str = "test") -> None:
    """Index a source, and commit a feature of all its images, of which some failed."""
    info = index(source, path, chunk_size=CHUNK)
    group = create_group(path, "image", encoder, info, spec="test:m", fingerprint={"weights": "w"})
    add_feature(group, "f", (2,), "float32")
    for chunk in range(info.num_chunks("image")):
        span = info.chunk_rows("image", chunk)
        numbers = range(span.start, span.stop)
        items: list[Array | None] = [None if row in failed else vector(row) for row in numbers]
        reasons = ["broken" if row in failed else None for row in numbers]
        commit_chunk(group, chunk, {"f": items}, [row.to_bytes(16, "big") for row in numbers], {"f": reasons})


def vector(row: int) -> Array:
    return np.full(2, row, np.float32)


def sample(name: str) -> Sample:
    return Sample(key=name, images=(FileItem(path=f"{name}.png", length=1),), texts=(TextItem(text=name),))


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=6), st.integers(1, 10))
def test_extend_appends_new_samples(tmp_path_factory: pytest.TempPathFactory, places: list[int], num_old: int) -> None:
    path = tmp_path_factory.mktemp("c")
    old = rows(num_old)
    begin(path, old)
    longer = list(old.rows)
    for number, place in enumerate(places):
        longer.insert(min(place, len(longer)), sample(f"new{number}"))
    index(Rows(longer), path, extend=True)
    cache = Cache(path)
    new = [one.key for one in longer if one.key.startswith("new")]
    assert cache.samples["key"].to_pylist() == [*(one.key for one in old.rows), *new]
    assert cache.items("image")["path"].to_pylist()[num_old:] == [f"{key}.png" for key in new]
    assert cache.items("image")["sample"].to_pylist() == list(range(num_old + len(new)))
    chunks = [cache.items("image", chunk=chunk) for chunk in range(cache.info.num_chunks("image"))]
    assert [path for chunk in chunks for path in chunk["path"].to_pylist()] == cache.items("image")["path"].to_pylist()
    assert index(Rows(longer), path) == cache.info, "the longer source is the cache's source now"


def test_extend_repeatedly(tmp_path: Path) -> None:
    source = rows(3)
    begin(tmp_path, source)
    for number in range(4):
        source = Rows([sample(f"{9 - number}"), *source.rows])
        info = index(source, tmp_path, extend=True)
    assert [part.num_samples for part in info.parts] == [3, 1, 1, 1, 1]
    assert Cache(tmp_path).samples["key"].to_pylist() == ["k0", "k1", "k2", "9", "8", "7", "6"]
    assert index(source, tmp_path) == info
    with pytest.raises(FingerprintError, match="sample '8' is missing"):
        index(Rows([one for one in source.rows if one.key != "8"]), tmp_path)


@pytest.mark.parametrize(("max_new", "num_read"), [(0, 4), (1, 5), (2, 6), (7, 11), (8, 11), (None, 11)])
def test_source_is_read_no_further_than_needed(tmp_path: Path, max_new: int | None, num_read: int) -> None:
    info, source = index(rows(4), tmp_path), CountedRows([*rows(4).rows, *(sample(f"n{n}") for n in range(7))])
    on_new, progress = list[list[Sample]]().append, RecordedProgress()
    changes = find_changes(tmp_path, info, source.samples(), on_new=on_new, max_new=max_new, progress=progress)
    assert (changes.num_new, source.num_read) == (num_read - 4, num_read)


def test_extend_starts_over_if_another_process_was_first(tmp_path: Path) -> None:
    begin(tmp_path, rows(3))

    class Interrupted(Rows):
        def samples(self) -> Iterator[Sample]:
            if read_info(tmp_path).num_samples == 3:
                index(rows(5), tmp_path, extend=True)
            return iter(self.rows)

    info = index(Interrupted(rows(9).rows), tmp_path, extend=True)
    assert [part.num_samples for part in info.parts] == [3, 2, 4]
    assert Cache(tmp_path).samples["key"].to_pylist() == [f"k{row}" for row in range(9)]
    assert not list(tmp_path.glob("*.partial"))


def changed(source: Rows, row: int, **fields: object) -> Rows:
    return Rows([replace(one, **fields) if number == row else one for number, one in enumerate(source.rows)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (rows(5), "'k5'"),
        (Rows([*rows(6).rows[:4], rows(6).rows[5], rows(6).rows[4]]), "'k5'"),
        (Rows([*rows(6).rows, sample("a")]), "--extend"),
        (changed(rows(6), 2, texts=(TextItem(text="other"),)), "'k2'"),
        (changed(rows(6), 2, images=(FileItem(path="x.png", length=2),)), "'k2'"),
        (changed(rows(6), 2, images=(FileItem(path="2.png", length=9),)), "row 2"),
        (changed(rows(6), 2, columns={"label": 5}), "columns or languages of its samples differ"),
    ],
    ids=["gone", "reordered", "added", "caption", "image", "bytes", "columns"],
)
def test_changed_source_raises(tmp_path: Path, now: Rows, words: str) -> None:
    begin(tmp_path, rows(6))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FingerprintError, match=words):
        index(now, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("table", ["image/items-0.parquet", "text/items-0.parquet"])
def test_damaged_table_is_not_taken_for_another_source(tmp_path: Path, table: str) -> None:
    begin(tmp_path, rows(6))
    flip(tmp_path / table, 100)
    with pytest.raises(CorruptError, match=f"{table}: expected checksum .*; restore"):
        index(Rows([*rows(6).rows, sample("a")]), tmp_path, extend=True)


def replaced(source: Rows, failed: Sequence[int]) -> Rows:
    """Return the source with other bytes of some images."""
    for row in failed:
        moved = FileItem(path=f"{row}.png", offset=10 * row + 1, length=100 + row)
        source = changed(source, row, images=(moved,))
    return source


@pytest.mark.parametrize("added", [0, 2])
def test_replaced_images_of_several_chunks_have_their_new_place(tmp_path: Path, added: int) -> None:
    failed = (0, 3, 4, 7, 8)
    begin(tmp_path, rows(9), failed=failed)
    source = Rows([*(sample(f"n{number}") for number in range(added)), *replaced(rows(9), failed).rows])
    with pytest.raises(FingerprintError, match="5 of its failed images have other bytes now; "):
        index(source, tmp_path, extend=True)
    info = index(source, tmp_path, extend=True, accept_replaced=True)
    images = Cache(tmp_path).items("image")
    assert images["length"].to_pylist() == [100 + row if row in failed else row for row in range(9)] + [1] * added
    assert images["offset"].to_pylist() == [10 * row + 1 if row in failed else 0 for row in range(9)] + [0] * added
    assert [part.num_samples for part in info.parts] == ([9, added] if added else [9])
    assert index(source, tmp_path) == info == read_info(tmp_path)
    names = sorted(path.name for path in tmp_path.rglob("*.parquet"))
    assert names == sorted(Path(file.name).name for part in info.parts for file in part.tables.values())


@pytest.mark.parametrize("row", [3, 6])
def test_replaced_images_of_which_one_has_features_raise(tmp_path: Path, row: int) -> None:
    begin(tmp_path, rows(9), failed=(2, 7))
    with pytest.raises(FingerprintError, match=f"row {row}"):
        index(replaced(rows(9), (2, row)), tmp_path, accept_replaced=True)
