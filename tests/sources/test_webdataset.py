import json
from pathlib import Path

import pytest

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.sources import Source, TextItem, open_source, reopen_source
from tests.sources.contract import SourceContract
from tests.sources.files import COLOURS, jpeg, write_tar


def members(first: int, number: int) -> list[tuple[str, bytes | str]]:
    return [
        member
        for n in range(first, first + number)
        for member in (
            (f"{n:04d}.jpg", jpeg(COLOURS[n % 5])),
            (f"{n:04d}.txt", f"caption {n}"),
            (f"{n:04d}.json", json.dumps({"width": n})),
        )
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", members(10 * shard, 4))
    return tmp_path


class TestFolderOfShards(SourceContract):
    @pytest.fixture
    def source(self, shards: Path) -> Source:
        return open_source(shards)


class TestBracePattern(SourceContract):
    @pytest.fixture
    def source(self, shards: Path) -> Source:
        return open_source(shards / "{00000..00001}.tar")


class TestOneShard(SourceContract):
    @pytest.fixture
    def source(self, shards: Path) -> Source:
        return open_source(shards / "00001.tar")


def test_a_sample_joins_the_files_of_one_name(shards: Path) -> None:
    sample = list(open_source(shards).samples())[5]
    assert sample.key == "0011"
    assert sample.texts == (TextItem(text="caption 11"),)
    assert sample.columns == {"width": 11}
    assert sample.images[0].path == "00001.tar"


def test_an_item_says_where_the_bytes_lie(shards: Path) -> None:
    item = list(open_source(shards).samples())[5].images[0]
    data = (shards / item.path).read_bytes()
    assert data[item.offset : item.offset + item.length] == jpeg(COLOURS[11 % 5])


def test_a_pattern_takes_the_shards_it_names_and_no_more(shards: Path) -> None:
    keys = [sample.key for sample in open_source(shards / "{00001..00002}.tar").samples()]
    assert keys == [f"{n:04d}" for first in (10, 20) for n in range(first, first + 4)]


def test_the_folder_of_a_member_is_part_of_its_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.b/c.d.jpg", jpeg()), ("a.b/e.txt", "words")])
    assert [sample.key for sample in open_source(path).samples()] == ["a.b/c", "a.b/e"]


def test_more_shards_than_files_kept_open_are_read(tmp_path: Path) -> None:
    for shard in range(40):
        write_tar(tmp_path / f"{shard:02d}.tar", [(f"{shard}.jpg", jpeg(COLOURS[shard % 5]))])
    source = open_source(tmp_path)
    items = [sample.images[0] for sample in source.samples()]
    for _ in range(2):
        assert [source.read(item) for item in items] == [jpeg(COLOURS[n % 5]) for n in range(40)]


@pytest.mark.parametrize("keep", [100, 700, 2_048, 5_000])
def test_a_truncated_shard_is_named_with_the_offset(tmp_path: Path, keep: int) -> None:
    path = write_tar(tmp_path / "cut.tar", members(0, 4))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"cut\.tar.*offset \d+|cut\.tar.*truncated"):
        list(open_source(path).samples())


def test_a_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(SourceError, match=r"no\.tar is no tar"):
        list(open_source(path).samples())


def test_broken_captions_are_a_sample_with_the_reason(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("0001.jpg", jpeg()), ("0001.json", "{"), ("0002.txt", "words")])
    first, second = open_source(path).samples()
    assert str(first.columns["caption_error"]).startswith("0001.json is not valid JSON")
    assert second.texts == (TextItem(text="words"),)


def test_a_shard_missing_from_a_pattern_is_named(shards: Path) -> None:
    with pytest.raises(PathError, match=r"00003\.tar.*1 of 4"):
        open_source(shards / "{00000..00003}.tar")


def test_shards_that_are_gone_cannot_be_reopened(shards: Path) -> None:
    description = open_source(shards / "00000.tar").describe()
    (shards / "00000.tar").unlink()
    with pytest.raises(PathError, match=r"00000\.tar"):
        reopen_source(description)


def test_a_shard_cut_after_indexing_is_an_item_with_a_reason(shards: Path) -> None:
    source = open_source(shards / "00000.tar")
    last = list(source.samples())[-1].images[0]
    data = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(data[: last.offset + 10])
    with pytest.raises(ItemError, match=r"00000\.tar ends"):
        source.read(last)
