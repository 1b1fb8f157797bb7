"""Sources by URL, read from real servers on this machine."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from embedcache.errors import ItemError, PathError
from embedcache.sources import ImageItem, Source, open_source, reopen_source
from embedcache.sources.media import decode_image
from tests.sources.contract import SourceContract
from tests.sources.files import COLOURS, jpeg, write, write_parquet, write_tar
from tests.sources.s3 import WebServer, upload

IMAGES = [jpeg(colour) for colour in COLOURS]


def shards(folder: Path, number: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(number):
        members = [(f"{shard}{n}{suffix}", content) for n in range(5) for suffix, content in (
            (".jpg", IMAGES[n]), (".txt", f"caption {n}"), (".json", json.dumps({"width": n})))]  # fmt: skip
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def pictures(folder: Path) -> Path:
    return write(
        folder,
        {
            "b.JPG": IMAGES[0],
            "b.txt": "a red square",
            "animals/a dog + cat.jpeg": IMAGES[1],
            "animals/a dog + cat.json": json.dumps({"captions": ["ein Hund"], "language": "de"}),
            ".hidden/x.jpg": b"",
        },
    )


class TestFolderOnS3(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, bucket: str) -> Source:
        return open_source(upload(pictures(tmp_path), f"{bucket}/deep/pictures"))

    def test_it_gives_the_samples_of_the_same_folder_here(self, tmp_path: Path, source: Source) -> None:
        assert list(source.samples()) == list(open_source(tmp_path).samples())


class TestPatternOnS3(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, bucket: str) -> Source:
        return open_source(upload(shards(tmp_path), f"{bucket}/shards") + "/{00000..00001}.tar")


class TestFolderOfShardsOnS3(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, bucket: str) -> Source:
        return open_source(upload(shards(tmp_path), f"{bucket}/shards"))

    def test_it_gives_the_samples_of_the_same_folder_here(self, tmp_path: Path, source: Source) -> None:
        assert list(source.samples()) == list(open_source(tmp_path).samples())


class TestParquetOfBytesOnS3(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, bucket: str) -> Source:
        write_parquet(tmp_path / "t.parquet", image=IMAGES, caption=list(COLOURS))
        return open_source(upload(tmp_path, bucket) + "/t.parquet")


class TestFolderOfTablesOnS3(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, bucket: str) -> Source:
        write(tmp_path, {f"images/{n}.bin": data for n, data in enumerate(IMAGES)})
        write(tmp_path, {"sub/t.csv": "image,caption\n" + "".join(f"../images/{n}.bin,c\n" for n in range(5))})
        write(tmp_path, {"t.jsonl": '{"image": "images/0.bin", "caption": ["x", "y"]}\n'})
        return open_source(upload(tmp_path, f"{bucket}/tables"))

    def test_items_lie_below_the_folder(self, source: Source) -> None:
        assert [s.images[0].path for s in source.samples()] == [*(f"images/{n}.bin" for n in range(5)), "images/0.bin"]


class TestOneShardByHttp(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, web: WebServer) -> Source:
        shards(tmp_path / "web")
        return open_source(f"{web.url}/00001.tar")


class TestPatternByHttp(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, web: WebServer) -> Source:
        shards(tmp_path / "web")
        return open_source(f"{web.url}/{{00000..00002}}.tar")


class TestParquetByHttp(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, web: WebServer) -> Source:
        write_parquet(tmp_path / "web" / "t.parquet", image=IMAGES, caption=list(COLOURS))
        return open_source(f"{web.url}/t.parquet")


class TestTableHereOfUrls(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, web: WebServer, bucket: str) -> Source:
        write(tmp_path / "web", {"0.jpg": IMAGES[0], "1.jpg": IMAGES[1]})
        upload(tmp_path / "web", f"{bucket}/x")
        urls = [f"{web.url}/0.jpg?size=1", f"{bucket}/x/1.jpg"]
        return open_source(write_parquet(tmp_path / "t.parquet", image=urls, caption=["a", "b"]))


class TestMemory(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        from embedcache.paths import open_path

        root = open_path("memory://tests-of-sources/pictures")
        for path in pictures(tmp_path).rglob("*.*"):
            if path.is_file():
                there = root / str(path.relative_to(tmp_path))
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(path.read_bytes())
        return open_source(str(root))
