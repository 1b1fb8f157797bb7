from pathlib import Path

import pytest

from embedcache.errors import ItemError, PathError
from embedcache.sources import Source, open_source
from embedcache.sources.webdataset import expand_braces
from embedcache.testing.sources import SourceContract
from tests.sources.files import COLORS, jpeg, reopen, write, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(2):
        members = [(f"{shard}{n}{suffix}", content) for n in range(4) for suffix, content in (
            (".jpg", jpeg(COLORS[n])), (".txt", f"caption {n}"), (".json", f'{{"width": {n}}}'))]  # fmt: skip
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    return tmp_path


class TestFolderOfShards(SourceContract):
    @pytest.fixture
    def source(self, shards: Path) -> Source:
        return open_source(shards)


class TestClassificationSet(SourceContract):
    """CLIP_benchmark's layout: shards of a split are numbered from 0, and so are their keys."""

    has_texts = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write_classes(tmp_path))


def write_classes(folder: Path) -> Path:
    write(folder, {"classnames.txt": "cat\ndog\n", "zeroshot_classification_templates.txt": "a photo of a {c}.\n"})
    for split, labels in (("train", [1, 0]), ("test", [0])):
        write(folder, {f"{split}/nshards.txt": "1"})
        names = [(f"s{number:07d}", label) for number, label in enumerate(labels)]
        members = [m for name, label in names for m in ((f"{name}.cls", str(label)), (f"{name}.jpg", jpeg()))]
        write_tar(folder / split / "0.tar", members)
    return folder


def test_classification_dataset_labels_and_splits(tmp_path: Path) -> None:
    samples = list(open_source(write_classes(tmp_path)).samples())
    assert [(sample.key, dict(sample.columns)) for sample in samples] == [
        ("test/s0000000", {"split": "test", "label": 0}),
        ("train/s0000000", {"split": "train", "label": 1}),
        ("train/s0000001", {"split": "train", "label": 0}),
    ]


@pytest.mark.parametrize("content", [b"cat", b"", b"0.5", b"9" * 5000])
def test_invalid_cls_is_reported_in_a_column(tmp_path: Path, content: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.cls", content), ("0.jpg", jpeg()), ("1.cls", "3"), ("1.jpg", jpeg())])
    first, second = open_source(path).samples()
    assert "label" not in first.columns
    assert str(first.columns["label_error"]).startswith("0.cls holds b'")
    assert second.columns == {"label": 3}


def test_json_overrides_the_label_and_the_folder_is_part_of_the_key(tmp_path: Path) -> None:
    members = [("a.b/0.cls", "3"), ("a.b/0.jpg", jpeg()), ("a.b/0.json", '{"label": "cat", "w": 1}')]
    (sample,) = open_source(write_tar(tmp_path / "x.tar", members)).samples()
    assert (sample.key, sample.columns) == ("a.b/0", {"label": "cat", "w": 1})


def test_members_of_other_kinds_are_counted(tmp_path: Path) -> None:
    names = ["x/1.2.jpg", "x/1.2.txt", "x/2.3.JPG", "x/3.jpg", "x/3.txt", "x/3.url", "x/4", "x/.hidden", "x/3.cls"]
    write_tar(tmp_path / "a.tar", [(name, "1") for name in names])
    write_tar(tmp_path / "b.tar", [("9.jpg", jpeg()), ("9.seg.png", b""), ("9.svg", b"")])
    source = open_source(tmp_path)
    for _ in range(2):
        assert "x/3" in [sample.key for sample in source.samples()]
        assert source.skipped == {  # type: ignore[attr-defined]
            ".jpg after another dot in the name": 2,
            ".txt after another dot in the name": 1,
            ".png after another dot in the name": 1,
            ".url": 1,
            ".svg": 1,
            "files without a suffix": 1,
        }


def test_shard_truncated_later_raises_item_error(shards: Path) -> None:
    source = open_source(shards / "00000.tar")
    last = list(source.samples())[-1].images[0]
    data = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(data[: last.offset + 10])
    with pytest.raises(ItemError, match=r"00000\.tar ends"):
        source.read(last)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{2..0}.tar", ["2.tar", "1.tar", "0.tar"]),
        ("{val,train}/{0..1}.tar", ["val/0.tar", "val/1.tar", "train/0.tar", "train/1.tar"]),
        ("{only}.tar", ["{only}.tar"]),
        ("s3://b/{0..1}-{a,b}.tar", ["s3://b/0-a.tar", "s3://b/0-b.tar", "s3://b/1-a.tar", "s3://b/1-b.tar"]),
    ],
)
def test_expand_braces(pattern: str, paths: list[str]) -> None:
    assert list(expand_braces(pattern)) == paths


@pytest.fixture
def split_folders(tmp_path: Path) -> Path:
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for n in range(2):
            write_tar(tmp_path / folder / f"{n}.tar", [(f"{folder}{n}.jpg", jpeg())])
    return tmp_path


@pytest.mark.parametrize(
    ("location", "paths"),
    [
        ("train/0.tar::val/1.tar", ["0.tar", "{}/val/1.tar"]),
        ("{val,train}/1.tar", ["val/1.tar", "train/1.tar"]),
        ("val::train", ["0.tar", "1.tar", "{}/train/0.tar", "{}/train/1.tar"]),
    ],
)
def test_several_locations_are_one_source(
    split_folders: Path, location: str, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(split_folders)
    source = open_source(location)
    monkeypatch.chdir("/")
    items = [sample.images[0] for sample in source.samples()]
    assert [item.path for item in items] == [path.format(split_folders) for path in paths]
    assert {source.read(item) for item in items} == {jpeg()}
    assert list(reopen(source.describe()).samples()) == list(source.samples())


def test_missing_shard_of_a_list_raises(split_folders: Path) -> None:
    with pytest.raises(PathError, match=r"got no file at .*val/2\.tar"):
        open_source(f"{split_folders}/train/0.tar::{split_folders}/val/{{0..2}}.tar")
    (split_folders / "val/2.tar").write_bytes((split_folders / "val/0.tar").read_bytes())
    (split_folders / "val/1.tar").unlink()
    source = open_source(f"{split_folders}/val/{{0..2}}.tar")
    with pytest.raises(PathError, match=r"no such file: .*val/1\.tar"):
        list(source.samples())
