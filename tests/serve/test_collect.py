"""Selections of collected items: by the API, and by a visitor of the page of real drawings with their names."""

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from embedcache.curate.map import build_map, read_map
from embedcache.curate.settings import MapSettings
from embedcache.dataset.keytable import read_header
from embedcache.dataset.selections import read_selection
from embedcache.errors import PathError
from embedcache.extract.extract import extract
from embedcache.progress import NullProgress
from embedcache.provenance import replacing_files
from embedcache.search.index import build_index
from embedcache.search.search import OpenIndex
from embedcache.search.settings import IndexSettings
from embedcache.serve.service import SearchService, ServePaths, open_service
from embedcache.serve.settings import ServeSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.crash import start
from tests.serve.browser import Browsing, open_browser
from tests.serve.conftest import visit
from tests.serve.test_safety import TOKEN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
URL = "/api/selection"


def body(*rows: int) -> bytes:
    return np.array(rows, "<u4").tobytes()


def keys_in(path: Path, cache: Path) -> set[str]:
    opened = Cache(cache)
    return {opened.key(row) for row in read_selection(path, [opened]).tolist()}


@pytest.fixture
def saving(root: Path, tmp_path: Path) -> SearchService:
    """A service that may write one file."""
    with replacing_files(is_allowed=False):
        paths = ServePaths(index=root / "index", collect=tmp_path / "kept.parquet")
        return open_service(paths, ServeSettings(), device="cpu", progress=NullProgress())


def test_download_is_selection_of_cache(client: TestClient, root: Path, tmp_path: Path) -> None:
    version = client.get("/api/info").json()["version"]
    answer = client.post(f"{URL}?version={version}", content=body(33, 4, 33, 79))
    assert answer.status_code == 200
    path = tmp_path / "selection.parquet"
    path.write_bytes(answer.content)
    cache = Cache(root / "cache")
    assert read_selection(path, [cache]).tolist() == [4, 33, 79]
    header = read_header(path, "selection")
    assert (header["caches"], header["index_digests"]) == (["cache"], [cache.info.index_digest])


def test_bad_rows_are_refused(client: TestClient) -> None:
    for content, status in ((b"", 422), (b"abc", 422), (body(80), 400), (bytes(4_000_004), 413)):
        assert client.post(URL, content=content).status_code == status, len(content)
    assert client.post(f"{URL}?version=other", content=body(0)).status_code == 409


def test_nothing_is_saved_without_flag(client: TestClient) -> None:
    assert client.get("/api/info").json()["collect"] is None
    assert client.put(URL, content=body(0)).status_code == 404


def test_file_is_saved_once(saving: SearchService, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.parquet"
    with visit(saving) as client, replacing_files(is_allowed=False):
        assert client.put(URL, content=body(7, 5)).json() == {"name": "kept.parquet", "num_samples": 2}
        written = path.read_bytes()
        answer = client.put(URL, content=body(1))
        assert answer.status_code == 400
        assert str(tmp_path) not in answer.text
        assert path.read_bytes() == written
    with visit(saving) as client, replacing_files(is_allowed=True):
        assert client.put(URL, content=body(1)).status_code == 200
    assert read_selection(path, [Cache(root / "cache")]).tolist() == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_strangers_write_nothing(saving: SearchService, tmp_path: Path) -> None:
    with visit(saving, token=TOKEN) as client:
        for headers, status in (
            ({}, 401),
            ({"Authorization": f"Bearer {TOKEN}x"}, 401),
            ({"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"}, 403),
            ({"Authorization": f"Bearer {TOKEN}", "Sec-Fetch-Site": "cross-site"}, 403),
        ):
            for method in ("POST", "PUT"):
                assert client.request(method, URL, content=body(0), headers=headers).status_code == status
        assert list(tmp_path.iterdir()) == []
        authorized = {"Authorization": f"Bearer {TOKEN}"}
        assert client.put(URL, content=body(0), headers=authorized).status_code == 200


def test_existing_file_fails_at_start(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.parquet").touch()
    for name in ("kept.parquet", "kept.txt"):
        paths = ServePaths(index=root / "index", collect=tmp_path / name)
        with replacing_files(is_allowed=False), pytest.raises(PathError):
            open_service(paths, ServeSettings(), device="cpu", progress=NullProgress())


# The page


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the English and German names of 90 OpenMoji, two captions of each drawing."""
    root = tmp_path_factory.mktemp("drawings")
    (root / "files").mkdir()
    source = open_source("openmoji:en+de")
    for sample in islice(source.samples(), 500, 590):
        (root / "files" / f"{sample.key}.png").write_bytes(source.read(sample.images[0]))
        names = [item.text for item in sample.texts]
        (root / "files" / f"{sample.key}.txt").write_text("\n".join(names))
    extract(open_source(root / "files"), root / "cache", text_encoder=["st:all-MiniLM-L6-v2"])
    build_index(root / "cache", root / "index", IndexSettings(feature="all-MiniLM-L6-v2/mean", modality="text"))
    build_map(root / "index", MapSettings(projection="pca"))
    return root


@pytest.fixture
def link(drawings: Path, tmp_path: Path) -> Iterator[str]:
    """The printed link of a server that was started from the command line."""
    pipe = tmp_path / "printed"
    os.mkfifo(pipe)
    command = ["serve", str(drawings / "index"), "--port", "0", "--collect", str(tmp_path / "kept.parquet")]
    server = start(command, output=pipe)
    with pipe.open() as printed:
        yield next(line.split()[1] for line in printed if line.startswith("open http"))
        server.terminate()
        server.join()


def draw(page: Browsing, corners: Sequence[tuple[float, float]]) -> None:
    """Draw a lasso through corners, in parts of the frame's size."""
    box = page.page.locator(".frame").bounding_box()
    mouse = page.page.mouse
    for place, (x, y) in enumerate(corners):
        mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=1 if place == 0 else 8)
        if place == 0:
            mouse.down()
    mouse.up()


def keys_in_lasso(drawings: Path) -> set[str]:
    """Return the keys of the samples whose captions are in the lasso that is drawn below."""
    found = read_map(OpenIndex(drawings / "index"))
    assert found is not None
    x, y = (0.5 + (found.points - 0.5) * 0.92).T  # the map has margins of 4%
    is_inside = (x > 0.05) & (x < 0.95) & (y > 0.05) & (y < 0.95) & ~((x > 0.55) & (y > 0.5))
    cache = Cache(drawings / "cache")
    samples = cache.table("text", ["sample"])["sample"].to_numpy()[found.rows[is_inside]]
    return {cache.key(sample) for sample in samples.tolist()}


def collect_by_ticks(page: Browsing) -> set[str]:
    """Tick the first result, and the third one by keys; return their keys."""
    page.type("a bird")
    page.page.click("#results li:first-child .tick")
    for key in ("/", "ArrowDown", "ArrowRight", "ArrowRight", "c", "Tab"):
        page.page.keyboard.press(key)
    assert page.page.evaluate("document.activeElement.checked")
    keys = page.page.eval_on_selector_all("#results .hit", "all => all.map((one) => one.dataset.key)")

    page.type("food")
    assert page.text("#collected-count") == "2 collected"
    page.page.click("#collect-shown")
    assert page.page.locator("#results .tick input:checked").count() == 60
    page.page.click("#collected-undo")
    page.wait_for("#collected-count", "2 collected")
    return {keys[0], keys[2]}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_ticks_and_lasso_become_selection(link: str, drawings: Path, tmp_path: Path) -> None:
    """A lasso that is not convex, after two ticks: the downloaded and the saved selection have exactly these keys."""
    address, token = link.split("/?token=")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(f"{address}{URL}", data=body(0), method="PUT"))

    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as browser:
        page = Browsing(browser, address, extra_http_headers={"Authorization": f"Bearer {token}"})
        expected = collect_by_ticks(page)
        page.page.click("#tab-map")
        page.page.click("text=Lasso >> nth=0")
        draw(page, [(0.05, 0.05), (0.95, 0.05), (0.95, 0.5), (0.55, 0.5), (0.55, 0.95), (0.05, 0.95)])
        page.page.wait_for_function("() => document.querySelector('#collected-count').textContent !== '2 collected'")
        page.page.click("#collected-show")
        page.page.wait_for_selector("#collected-items li")
        assert page.barriers() == []

        with page.page.expect_download() as download:
            page.page.click("#collected-download")
        download.value.save_as(tmp_path / "selection.parquet")
        for answer in ("kept.parquet has", "exists"):  # the second time, it is refused
            page.page.click("#collected-save")
            page.wait_for("#collected-note", answer)
        page.page.click("#collected-clear")
        page.wait_for("#collected-count", "0 collected")
        page.close()

    inside = keys_in_lasso(drawings)
    assert 10 < len(inside) < 90
    for name in ("selection.parquet", "kept.parquet"):
        assert keys_in(tmp_path / name, drawings / "cache") == expected | inside
