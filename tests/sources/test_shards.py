from pathlib import Path

import pytest

from embedcache.errors import PathError
from embedcache.sources import open_source, reopen_source
from embedcache.sources.webdataset import expand_braces
from tests.sources.files import jpeg, write_tar


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{2..0}.tar", ["2.tar", "1.tar", "0.tar"]),
        ("{1..010}.tar", [f"{n:03d}.tar" for n in range(1, 11)]),
        ("{val,train}/{0..1}.tar", ["val/0.tar", "val/1.tar", "train/0.tar", "train/1.tar"]),
        ("x{,-b}.tar", ["x.tar", "x-b.tar"]),
        ("{only}.tar", ["{only}.tar"]),
        ("s3://b/{0..1}-{a,b}.tar", ["s3://b/0-a.tar", "s3://b/0-b.tar", "s3://b/1-a.tar", "s3://b/1-b.tar"]),
    ],
)
def test_expand_braces(pattern: str, paths: list[str]) -> None:
    assert expand_braces(pattern) == paths


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for n in range(2):
            write_tar(tmp_path / folder / f"{n}.tar", [(f"{folder}{n}.jpg", jpeg())])
    return tmp_path


@pytest.mark.parametrize(
    ("location", "paths"),
    [
        ("train/0.tar::val/1.tar", ["0.tar", "{}/val/1.tar"]),
        ("train/{0..1}.tar::val/0.tar", ["0.tar", "1.tar", "{}/val/0.tar"]),
        ("{val,train}/1.tar", ["val/1.tar", "train/1.tar"]),
        ("val::train", ["0.tar", "1.tar", "{}/train/0.tar", "{}/train/1.tar"]),
    ],
)
def test_several_locations_are_one_source(
    shards: Path, location: str, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    source = open_source(location)
    monkeypatch.chdir("/")
    items = [sample.images[0] for sample in source.samples()]
    assert [item.path for item in items] == [path.format(shards) for path in paths]
    assert {source.read(item) for item in items} == {jpeg()}
    assert list(reopen_source(source.describe()).samples()) == list(source.samples())


def test_missing_shard_of_a_list_raises(shards: Path) -> None:
    with pytest.raises(PathError, match=r"val/2\.tar \(1 of 3"):
        open_source(f"{shards}/train/0.tar::{shards}/val/{{0..2}}.tar")
