from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import ArtifactError, CorruptError, FingerprintError, PathError, SettingError, SourceError
from embedcache.sources import FileItem, Sample, TextItem, open_source
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.store.removal import erase, remove_rows
from embedcache.store.tables import digest_input
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
