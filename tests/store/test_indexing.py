"""A source in a cache: how it is numbered, and once it has changed, what is taken in and what is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Array
from embedcache.errors import ArtifactError, CorruptError, FingerprintError, PathError, SettingError, SourceError
from embedcache.sources import FileItem, Sample, TextItem, open_source
from embedcache.store.cache import Cache
from embedcache.store.feature import create_group
from embedcache.store.indexing import find_changes, index
from embedcache.store.layout import read_info
from embedcache.store.removal import erase, remove_rows
from embedcache.store.tables import digest_input
from embedcache.store.writer import add_feature, commit_chunk
from tests.edits import flip
from tests.images import write_images
from tests.recorded import RecordedProgress


@dataclass
class Rows:
    """A source that is a list."""

    rows: list[Sample] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {"type": "rows", "path": "nowhere"}

    def samples(self) -> Iterator[Sample]:
        return iter(self.rows)

    def read(self, item: FileItem) -> bytes:
        raise AssertionError("indexing opens no image")


def rows(count: int) -> Rows:
    return Rows(
        [
            Sample(
                key=f"k{number}",
                images=(FileItem(path=f"{number}.png", length=number),),
                texts=tuple(TextItem(text=f"t{number}.{part}", language="en") for part in range(number % 3)),
                columns={"split": "train", "label": number} if number % 2 else {"label": None},
            )
            for number in range(count)
        ]
    )


def test_index_writes_a_row_per_item(tmp_path: Path) -> None:
    info = index(rows(10), tmp_path / "c", chunk_size=4)
    cache = Cache(tmp_path / "c")
    assert info == cache.info
    assert info.num_items == {"image": 10, "text": 9}
    assert cache.samples["key"].to_pylist() == [f"k{number}" for number in range(10)]
    assert cache.samples["label"].to_pylist() == [n if n % 2 else None for n in range(10)]
    assert cache.items("text")["sample"].to_pylist() == [1, 2, 2, 4, 5, 5, 7, 8, 8]
    assert cache.items("image", chunk=2)["path"].to_pylist() == ["8.png", "9.png"]
    assert info.num_chunks("text") == 3
    assert info.chunk_rows("text", 2) == slice(8, 9)


def test_index_again_changes_no_byte(tmp_path: Path) -> None:
    index(rows(10), tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.*")}
    index(rows(10), tmp_path / "c")
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.*")} == before


def begin_a_feature(cache_path: Path) -> None:
    commit = cache_path / "image" / "encoder" / "chunks" / "00000.json"
    commit.parent.mkdir(parents=True)
    commit.write_bytes(b"")
    (commit.parents[1] / "zarr.json").write_text("{}")


def test_index_again_without_features(tmp_path: Path) -> None:
    index(rows(10), tmp_path / "c", chunk_size=2)
    group = tmp_path / "c" / "image" / "encoder"
    group.mkdir()
    (group / "zarr.json").write_text("{}")
    assert index(rows(11), tmp_path / "c", chunk_size=3).num_samples == 11
    assert not group.exists()
    assert Cache(tmp_path / "c").items("image").num_rows == 11


def test_index_into_foreign_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PathError, match=r"not a cache and not empty: it contains thesis\.tex"):
        index(rows(2), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(("chunk_size", "expected"), [(None, 2048), (1, 1), (7, 7)])
def test_chunk_size_is_that_of_the_first_time(tmp_path: Path, chunk_size: int | None, expected: int) -> None:
    assert index(rows(2), tmp_path / "c", chunk_size=chunk_size).chunk_size == expected
    assert index(rows(3), tmp_path / "c").chunk_size == expected
    begin_a_feature(tmp_path / "c")
    assert index(rows(3), tmp_path / "c", chunk_size=expected).chunk_size == expected


@pytest.mark.parametrize(
    ("samples", "word"),
    [
        ([], "none"),
        ([Sample(key="bad", texts=(TextItem(text="\ud800"),))], "Unicode"),
        ([Sample(key="bad", columns={"when": date(2020, 1, 1)})], "date"),  # type: ignore[dict-item]
    ],
)
def test_samples_that_cannot_be_recorded_raise(tmp_path: Path, samples: list[Sample], word: str) -> None:
    with pytest.raises(SourceError, match=word):
        index(Rows(samples), tmp_path / "c")


def test_index_after_kill(tmp_path: Path) -> None:
    (tmp_path / ".indexing.elsewhere.1.ab.partial").mkdir()
    (tmp_path / ".cache.json.elsewhere.1.ab.partial").write_text("{")
    (tmp_path / "samples-0.parquet").write_text("half")
    assert index(rows(2), tmp_path).num_samples == 2


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ('{"format": 2}', ArtifactError, "has cache format 2; this version reads 1: upgrade"),
        ('{"format": 1}', CorruptError, "has no digest of its content"),
        ("[]", ArtifactError, "was not written by embedcache"),
        ("{", CorruptError, "not valid JSON"),
    ],
)
def test_open_unreadable_cache_raises(tmp_path: Path, text: str, error: type[Exception], words: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(error, match=words):
        Cache(tmp_path)


def test_digest_of_images_and_texts_never_changes() -> None:
    sample = Sample(key="k", images=(FileItem(path="a.png", length=3),), texts=(TextItem(text="é", language="fr"),))
    expected = '["k",[["a.png",0,3]],[["é","fr"]],{"label":1}]\n'
    assert digest_input([replace(sample, columns={"label": 1}, files={"audio": ()})]) == expected.encode()


def test_item_tables_of_other_modalities(tmp_path: Path) -> None:
    source = rows(3)
    source.rows[1] = replace(source.rows[1], files={"audio": (FileItem(path="a.wav", start_s=1.0),)})
    info = index(source, tmp_path / "c")
    assert (info.num_items["audio"], set(info.parts[0].tables)) == (1, {"samples", "image", "text", "audio"})
    (row,) = Cache(tmp_path / "c").items("audio").to_pylist()
    assert row == {"sample": 1, "path": "a.wav", "offset": 0, "length": 0, "start_s": 1.0, "stop_s": None}
    assert not (tmp_path / "c" / "video").exists()


class CountedRows(Rows):
    """A source that counts the samples read."""

    def samples(self) -> Iterator[Sample]:
        self.num_read = 0
        for sample in self.rows:
            self.num_read += 1
            yield sample


def test_limit_takes_a_prefix_and_reads_no_further(tmp_path: Path) -> None:
    source = CountedRows(rows(10).rows)
    limited = index(source, tmp_path / "limited", chunk_size=4, limit=6)
    assert (limited.num_samples, source.num_read) == (6, 6)
    assert limited == index(rows(6), tmp_path / "c", chunk_size=4)
    begin_a_feature(tmp_path / "limited")
    assert (index(source, tmp_path / "limited", limit=6), source.num_read) == (limited, 6)
    with pytest.raises(FingerprintError, match="it has 4 more.*--extend, leave them out with --limit 6"):
        index(source, tmp_path / "limited")
    with pytest.raises(FingerprintError, match="it has 2 more.*--limit 6"):
        index(source, tmp_path / "limited", limit=8)
    with pytest.raises(SettingError, match=r"limit: expected at least the 6 samples that cache .*limited has, got 5"):
        index(source, tmp_path / "limited", limit=5)


def test_limit_counts_rows_of_the_cache(tmp_path: Path) -> None:
    """Samples that were added before the cached ones do not displace them."""
    index(Rows(rows(10).rows[4:]), tmp_path / "c", limit=3)
    begin_a_feature(tmp_path / "c")
    assert index(rows(10), tmp_path / "c", limit=3).num_samples == 3
    index(rows(10), tmp_path / "c", limit=5, extend=True)
    assert Cache(tmp_path / "c").samples["key"].to_pylist() == ["k4", "k5", "k6", "k0", "k1"]


def test_rows_of_a_cache_with_removed_samples_stay(tmp_path: Path) -> None:
    info = index(rows(10), tmp_path / "c", chunk_size=4)
    cache = Cache(tmp_path / "c")
    remove_rows(cache, np.array([3]), ["k3"])
    erase(tmp_path / "c")
    for extend in (False, True):
        with pytest.raises(SettingError, match="limit: expected at least the 10 samples that cache .* has, got 5"):
            index(rows(10), tmp_path / "c", limit=5, extend=extend)
    with pytest.raises(FingerprintError, match="chunk_size: stored 4, requested 2"):
        index(rows(10), tmp_path / "c", chunk_size=2)
    assert index(rows(10), tmp_path / "c", chunk_size=4, limit=10).num_items == info.num_items


def test_skipped_files_are_counted_by_kind(tmp_path: Path) -> None:
    source, progress = rows(5), RecordedProgress()
    source.skipped = {f".{n}": n for n in range(1, 8)}  # type: ignore[attr-defined]
    index(source, tmp_path / "c", progress=progress)
    (note,) = progress.notes
    assert note.endswith("28 files of kinds that samples do not have: 7 .7, 6 .6, 5 .5, 4 .4, 3 .3, and 2 more kinds")


def test_lines_of_a_text_are_questioned(tmp_path: Path) -> None:
    """Check that 21 captions per image are, and 20 are not."""
    source = write_images(tmp_path / "source", 3)
    for lines, num_notes in ((20, 0), (21, 1)):
        for number in range(3):
            (source / f"{number:05d}.txt").write_text("a line\n" * lines)
        progress = RecordedProgress()
        index(open_source(source), tmp_path / f"cache-{lines}", progress=progress)
        assert len([note for note in progress.notes if "captions" in note]) == num_notes


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
