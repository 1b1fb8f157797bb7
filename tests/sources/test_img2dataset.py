"""Shards as img2dataset writes them, by its documentation: a tar, a table of all URLs, and statistics."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import PathError, SourceError
from embedcache.sources import Source, TextItem, open_source
from embedcache.testing.sources import SourceContract
from tests.sources.files import COLORS, jpeg, write, write_parquet, write_tar
from tests.sources.s3 import WebServer

ROWS = 5
FAILED = 2  # the row whose URL cannot be downloaded


def row(shard: int, n: int) -> dict[str, Any]:
    is_good = n != FAILED
    return {
        "caption": f"caption {n}",
        "url": f"https://example.org/{shard}/{n}.jpg",
        "key": f"{shard:05d}{n:04d}",
        "status": "success" if is_good else "failed_to_download",
        "error_message": None if is_good else "HTTP Error 404: Not Found",
        "width": 20 if is_good else None,
        "height": 10 if is_good else None,
        "similarity": 0.25 + n,
        "exif": "{}" if is_good else None,
    }


def write_shard(folder: Path, shard: int, suffixes: tuple[str, ...]) -> None:
    rows = [row(shard, n) for n in range(ROWS)]
    members: list[tuple[str, bytes | str]] = []
    for n, one in enumerate(rows):
        if one["status"] == "success":
            files = {".jpg": jpeg(COLORS[n]), ".txt": one["caption"], ".json": json.dumps(one)}
            members += [(one["key"] + suffix, files[suffix]) for suffix in suffixes]
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / f"{shard:05d}.tar", members)
    write_parquet(folder / f"{shard:05d}.parquet", **{name: [one[name] for one in rows] for name in rows[0]})
    write(folder, {f"{shard:05d}_stats.json": json.dumps({"count": ROWS, "successes": ROWS - 1})})


def write_output(folder: Path, suffixes: tuple[str, ...] = (".jpg",)) -> Path:
    for shard in range(2):
        write_shard(folder, shard, suffixes)
    return folder


class TestOutputWithoutCaptionFiles(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write_output(tmp_path))


@pytest.mark.parametrize("suffixes", [(".jpg",), (".jpg", ".txt", ".json")])
def test_samples_have_the_columns_of_the_table(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    source = open_source(write_output(tmp_path, suffixes))
    assert source.describe()["type"] == "webdataset"
    samples = list(source.samples())
    assert [sample.key for sample in samples] == [
        f"{shard:05d}{n:04d}" for shard in range(2) for n in range(ROWS) if n != FAILED
    ]
    last = samples[-1]
    assert last.texts == (TextItem(text="caption 4"),)
    expected = {"url": "https://example.org/1/4.jpg", "width": 20, "height": 10, "similarity": 4.25, "exif": "{}"}
    assert {name: last.columns[name] for name in expected} == expected


def test_caption_in_tar_takes_precedence(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, (".jpg",))
    members = [("000000000.jpg", jpeg()), ("000000000.txt", "better words"), ("other.jpg", jpeg())]
    write_tar(tmp_path / "00000.tar", members)
    first, other = open_source(tmp_path).samples()
    assert first.texts == (TextItem(text="better words"),)
    assert (other.key, other.texts, other.columns) == ("other", (), {})
    write_parquet(tmp_path / "00000.parquet", key=["other"], caption=["not by img2dataset"])
    assert not list(open_source(tmp_path).samples())[1].texts


def test_damaged_table_raises(tmp_path: Path) -> None:
    write_shard(tmp_path, 1, (".jpg",))
    write(tmp_path, {"00001.parquet": b"PAR1 no table"})
    with pytest.raises(SourceError, match=r"00001\.parquet cannot be read"):
        list(open_source(tmp_path).samples())


def test_forbidden_table_counts_as_missing(tmp_path: Path) -> None:
    shards = write_output(tmp_path / "web", (".jpg", ".txt"))
    (shards / "00000.parquet").unlink()
    server = WebServer(shards, missing=403)
    try:
        samples = list(open_source(f"{server.url}/00000.tar").samples())
        with pytest.raises(PathError, match=r"cannot read .*00009\.tar: 403"):
            open_source(f"{server.url}/00009.tar")
    finally:
        server.stop()
    assert [sample.columns for sample in samples] == [{}] * (ROWS - 1)
