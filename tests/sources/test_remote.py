"""Sources behind URLs, read from local servers."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import ItemError, PathError
from embedcache.sources import FileItem, Source, open_source
from embedcache.testing.sources import SourceContract
from tests.sources.files import COLORS, jpeg, write, write_parquet, write_tar
from tests.sources.s3 import WebServer, forget_clients, upload

pytestmark = pytest.mark.slow

IMAGES = [jpeg(color) for color in COLORS]


def shards(folder: Path, number: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(number):
        members = [(f"{shard}{n}{suffix}", content) for n in range(5) for suffix, content in (
            (".jpg", IMAGES[n]), (".txt", f"caption {n}"), (".json", json.dumps({"width": n})))]  # fmt: skip
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def write_images(folder: Path) -> Path:
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
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Source:
        folder = tmp_path_factory.mktemp("source")
        return open_source(upload(write_images(folder), f"{bucket}/deep/images"))

    def test_samples_equal_those_of_the_local_folder(self, tmp_path: Path, source: Source) -> None:
        assert list(source.samples()) == list(open_source(write_images(tmp_path)).samples())


class TestFolderOfShardsOnS3(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Source:
        folder = tmp_path_factory.mktemp("source")
        return open_source(upload(shards(folder, 2), f"{bucket}/shards"))

    def test_samples_equal_those_of_the_local_folder(self, tmp_path: Path, source: Source) -> None:
        assert list(source.samples()) == list(open_source(shards(tmp_path, 2)).samples())


class TestParquetByHttp(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, web: WebServer) -> Source:
        write_parquet(web.folder / "t.parquet", image=IMAGES, caption=list(COLORS))
        return open_source(f"{web.url}/t.parquet")


class TestTableHereOfUrls(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory, web: WebServer, bucket: str) -> Source:
        folder = tmp_path_factory.mktemp("source")
        write(web.folder, {"0.jpg": IMAGES[0], "1.jpg": IMAGES[1]})
        upload(web.folder, f"{bucket}/x")
        urls = [f"{web.url}/0.jpg?size=1", f"{bucket}/x/1.jpg"]
        return open_source(write_parquet(folder / "t.parquet", image=urls, caption=["a", "b"]))


@pytest.mark.parametrize("path", ["none", "none.tar", "none.parquet", "{0..1}.tar"])
def test_missing_url_raises(bucket: str, web: WebServer, path: str) -> None:
    for server in (bucket, web.url):
        with pytest.raises(PathError, match=f"{server}/{path[0] if '{' not in path else ''}"):
            open_source(f"{server}/{path}")


@pytest.mark.parametrize("path", ["x", "x.parquet"])
def test_unreachable_server_raises(path: str, web: WebServer) -> None:
    web.stop()
    with pytest.raises(PathError, match=rf"cannot read {web.url}/.*(Connect|connect)"):
        open_source(f"{web.url}/{path}")


def test_missing_credentials_raise(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_clients()
    with pytest.raises(PathError, match=rf"cannot read {bucket}/x.tar: .*credentials"):
        open_source(f"{bucket}/x.tar")


def test_missing_image_raises_item_error(bucket: str, web: WebServer) -> None:
    shards(web.folder, 1)
    upload(web.folder, bucket)
    for url in (f"{web.url}/00000.tar", f"{bucket}/00000.tar", f"{bucket}/{{00000..00000}}.tar"):
        source = open_source(url)
        with pytest.raises(ItemError, match=rf"no such file: {url.rpartition('/')[0]}/gone.tar"):
            source.read(FileItem(path="gone.tar", length=5))
        with pytest.raises(ItemError, match=r"00000.tar ends \d+ bytes before"):
            source.read(FileItem(path="00000.tar", offset=1000, length=10**6))


def test_unreadable_url_raises_item_error(tmp_path: Path, web: WebServer) -> None:
    urls = [f"{web.url}/gone.jpg", "nonsense://x/y.jpg"]
    source = open_source(write_parquet(tmp_path / "t.parquet", image=urls))
    for item, words in zip((s.images[0] for s in source.samples()), ("no such file", "cannot be read"), strict=True):
        with pytest.raises(ItemError, match=f"{words}|{item.path}"):
            source.read(item)


@pytest.mark.parametrize("name", ["00000.tar", "t.parquet"])
def test_server_without_range_requests_raises(tmp_path: Path, name: str) -> None:
    image = np.random.default_rng(0).bytes(12_000_000)  # more than one block
    write_tar(tmp_path / "00000.tar", [("0.jpg", image), ("0.txt", "words")])
    write_parquet(tmp_path / "t.parquet", image=[image], caption=["words"])
    server = WebServer(tmp_path, has_ranges=False)
    try:
        with pytest.raises(PathError, match=rf"{name}.*range requests"):
            list(open_source(f"{server.url}/{name}").samples())
    finally:
        server.stop()


def test_adjacent_items_cost_one_request_per_block(web: WebServer) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    write_tar(web.folder / "0.tar", [(f"{n:03d}.jpg", data) for n in range(200)])
    source = open_source(f"{web.url}/0.tar")
    items = [sample.images[0] for sample in source.samples()]
    assert len(web.sent) == 3  # of 8 MiB, for 20 MB
    web.sent.clear()
    with ThreadPoolExecutor(16) as executor:
        assert set(executor.map(open_source(f"{web.url}/0.tar").read, items)) == {data}
    assert len(web.sent) == 3
    assert sum(web.sent) / (200 * len(data)) < 1.05


def test_only_one_row_group_is_read(web: WebServer) -> None:
    images = [np.random.default_rng(n).bytes(500_000) for n in range(20)]
    write_parquet(web.folder / "t.parquet", row_group_size=2, image=images, caption=["x"] * 20)
    source = open_source(f"{web.url}/t.parquet")
    samples = list(source.samples())
    assert sum(web.sent) < 5_000_000  # captions of ten groups, each with what is read ahead
    web.sent.clear()
    assert source.read(samples[7].images[0]) == images[7]
    assert sum(web.sent) < 2_000_000


def test_listings_are_not_cached(tmp_path: Path, bucket: str) -> None:
    url = upload(write(tmp_path, {"a.jpg": IMAGES[0]}), f"{bucket}/x")
    assert len(list(open_source(url).samples())) == 1
    upload(write(tmp_path, {"b.jpg": IMAGES[0]}), f"{bucket}/x")
    assert len(list(open_source(url).samples())) == 2
