"""Caches of strangers: what they name outside their source is neither read nor requested."""

import os
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedcache.extract.extract import extract
from embedcache.progress import NullProgress
from embedcache.provenance import read_json, write_json
from embedcache.registry import trust_files
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.serve.service import SearchService, ServePaths, open_service
from embedcache.serve.settings import ServeSettings
from embedcache.sources import open_source, read_below
from tests.edits import read_rows, write_tables
from tests.images import write_images
from tests.serve.conftest import visit
from tests.toy import IMAGE, TEXT

pytestmark = pytest.mark.slow


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A cache of a folder of eight images, its index of plain features, and a secret image outside."""
    write_images(tmp_path / "photos", 8)
    extract(open_source(tmp_path / "photos"), tmp_path / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(feature="open_toy/cls"))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "secret.png")
    return tmp_path


def tamper(
    cache: Path,
    *,
    paths: Sequence[str] = (),
    source: dict[str, Any] | None = None,
    modality: str = "image",
    **changes: int,
) -> None:
    """Change the paths of the first images, or of all images, in a cache."""
    if source is not None:
        info = read_json(cache / "cache.json")
        write_json(cache / "cache.json", {**info, "source": {**info["source"], **source}})
    table = read_rows(cache, modality)
    columns = table.to_pydict()
    columns["path"][: len(paths)] = paths
    for name, value in changes.items():
        columns[name][0] = value
    write_tables(cache, **{modality: pa.table(columns, schema=table.schema)})


def open_hostile(root: Path, **settings: Any) -> SearchService:
    return open_service(
        ServePaths(index=root / "index"), ServeSettings(**settings), device="cpu", progress=NullProgress()
    )


def test_images_outside_source_are_not_served(hostile: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What climbs, an absolute path, links of a file and of a folder, a pipe, a device, and a folder."""
    photos, secret = hostile / "photos", hostile / "secret.png"
    (photos / "x.png").symlink_to(secret)
    (photos / "x").symlink_to(hostile)
    os.mkfifo(photos / "pipe.png")
    written = ["../secret.png", str(secret), "x.png", "x/secret.png", "pipe.png", "/dev/zero", "../photos"]
    tamper(hostile / "cache", paths=written)

    with visit(open_hostile(hostile)) as client:
        for row, path in enumerate(written):
            caplog.clear()
            for size in ("thumbnail", "full"):
                answer = client.get(f"/api/images/{row}/{size}")
                assert answer.status_code == 404, path
                assert str(hostile) not in answer.text
            reasons = ("outside the source and --image-folder: ", "not a regular file: ")
            assert any(reason in caplog.text for reason in reasons), path
        assert client.get("/api/images/7/thumbnail").status_code == 200


def test_visitors_see_names_of_files_outside_source(hostile: Path) -> None:
    url = "https://user:key@host/a/secret.png?sig=1"
    tamper(hostile / "cache", paths=[f"{hostile}/secret.png", f"1/{hostile}/secret.png", "../a/secret.png", url])
    with visit(open_hostile(hostile)) as client:
        assert client.get("/api/items/3").json()["path"] == "secret.png"
        *outside, inside = client.get("/api/items?rows=0&rows=1&rows=2&rows=3&rows=4").json()
    assert [(item["path"], item["name"]) for item in outside] == [("secret.png", "secret.png")] * 4
    assert (inside["path"], inside["name"]) == ("00004.png", "00004")


def test_link_inside_source_is_served(hostile: Path) -> None:
    (hostile / "photos" / "x.png").symlink_to(hostile / "photos" / "00001.png")
    tamper(hostile / "cache", paths=["x.png"])
    with visit(open_hostile(hostile)) as client:
        assert client.get("/api/images/0/thumbnail").status_code == 200


def test_trusted_cache_may_lead_outside(hostile: Path) -> None:
    (hostile / "photos" / "x.png").symlink_to(hostile / "secret.png")
    tamper(hostile / "cache", paths=["x.png"])
    with trust_files():
        trusted = open_hostile(hostile)
    with visit(trusted) as client:
        assert client.get("/api/images/0/thumbnail").status_code == 200


@pytest.fixture
def trap() -> Iterator[tuple[str, list[str]]]:
    """A web server that must not receive a request: its address, and the requested paths."""
    requested: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_of_source_are_not_requested(hostile: Path, trap: tuple[str, list[str]]) -> None:
    address, requested = trap
    for kind, path in (
        ("folder", f"{address}/photos"),
        ("table", f"{address}/pairs.parquet"),
        ("webdataset", f"{hostile}/a.tar::{address}/b.tar"),
        ("webdataset", f"simplecache::{address}/b.tar"),
        ("pairs", f"folder:{address}/photos"),
        ("huggingface", "a-strangers/dataset"),
        ("os:system", "touch pwned"),
        ("subprocess:Popen", "touch pwned"),
    ):
        tamper(hostile / "cache", source={"type": kind, "path": path})
        served = open_hostile(hostile)
        assert served.images is None, (kind, path)
        assert "cannot be read" in served.info()["missing_images"]
        with visit(served) as client:
            assert client.get("/api/images/0/thumbnail").status_code == 404
            assert client.post("/api/search", json={"row": 0}).status_code == 200
    assert requested == []
    assert not Path("pwned").exists()


def test_urls_of_table_are_not_requested(hostile: Path, trap: tuple[str, list[str]]) -> None:
    address, requested = trap
    folder = hostile / "table"
    folder.mkdir()
    cells = [{"bytes": None, "path": f"{address}/cell.png"}, {"bytes": None, "path": str(hostile / "secret.png")}]
    pq.write_table(pa.table({"image": cells}), folder / "cells.parquet")
    tamper(hostile / "cache", source={"type": "table", "path": str(folder)}, paths=[f"{address}/item.png"])
    for changes in ({}, {"offset": 0}, {"offset": 1}):
        if changes:
            tamper(hostile / "cache", paths=["cells.parquet"], **changes)
        with read_below(folder):
            named = open_hostile(hostile)
        with visit(named) as client:
            assert client.get("/api/images/0/thumbnail").status_code == 404
    assert requested == []


def test_hostile_tar_lengths_take_no_memory(hostile: Path) -> None:
    (hostile / "photos" / "a.tar").write_bytes(b"\0" * 10_240)
    tamper(
        hostile / "cache",
        source={"type": "webdataset", "path": str(hostile / "photos" / "a.tar")},
        paths=["a.tar"],
        length=2**50,
    )
    with read_below(hostile / "photos"):
        named = open_hostile(hostile)
    with visit(named) as client:
        assert client.get("/api/images/0/thumbnail").status_code == 404


def test_operator_names_the_folder(hostile: Path) -> None:
    """The folder that the operator names holds, whatever the cache says."""
    tamper(hostile / "cache", source={"type": "folder", "path": str(hostile)}, paths=["secret.png"])
    assert open_hostile(hostile).images is None
    with read_below(hostile / "photos"):
        assert open_hostile(hostile).images is None
    with read_below(hostile):
        named = open_hostile(hostile)
    with visit(named) as client:
        assert client.get("/api/images/0/thumbnail").status_code == 200
