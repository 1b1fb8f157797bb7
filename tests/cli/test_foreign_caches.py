"""A crafted cache, by every command that reopens its source: nothing is read or asked that the user has not named."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from embedcache.extract.extract import extract
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.sources.open import remember
from embedcache.store.cache import Cache
from tests.cli.run import Result, embedcache
from tests.crash import forked_workers
from tests.edits import edit_record
from tests.images import write_images
from tests.toy import IMAGE, TEXT

pytestmark = pytest.mark.slow

NUM_HOSTILE = 5  # rows that are elsewhere, of which each has a feature
FAILED = 5
FEATURE = ("--feature", "open_toy/cls")
COMMANDS = {
    "webdataset": ("curate", "export", "copy", "keys.txt", "out", "--format", "webdataset"),
    "reencode": ("verify", "copy", "--reencode", "100%"),
    "repair": ("verify", "copy", "--repair"),
    "extract": ("extract", "copy", "copy", "--image-encoder", "tests.toy:open_other"),
    "two devices": ("extract", "copy", "copy", "--image-encoder", "tests.toy:open_other", "--device", "cpu,cpu"),
    "retry": ("extract", "copy", "copy", "--image-encoder", IMAGE, "--retry-failed"),
    "coverage": ("curate", "coverage", "copy", "copy", *FEATURE, "--html", "out.html"),
    "dedup": ("curate", "dedup", "copy", *FEATURE, "--html", "out.html"),
    "outliers": ("curate", "outliers", "copy", *FEATURE, "--html", "out.html"),
}
_RECORDED: list[list[tuple[str, str]]] = []
"""Lists that events are added to; an audit hook cannot be removed."""


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if _RECORDED and event in ("open", "socket.connect", "socket.getaddrinfo"):
        words = arguments[1] if event == "socket.connect" else arguments[0]
        if words == forkserver._forkserver._forkserver_address:  # type: ignore[attr-defined]  # starts the workers
            return
        _RECORDED[-1].append((event, words if isinstance(words, str) else repr(words)))


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    sys.addaudithook(_record)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """Record which files this process opens, and what it connects to."""
    _RECORDED.append([])
    try:
        yield _RECORDED[-1]
    finally:
        _RECORDED.pop()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stranger's cache of a table, and an index of it. The table names images elsewhere, and a text."""
    root = tmp_path_factory.mktemp("stranger")
    for folder, name in (("photos", "red"), ("photos", "blue"), ("", "secrets")):
        write_images(root / folder / name, 6, seed=len(name))
    (root / "photos/link.png").symlink_to(root / "secrets/00000.png")
    (root / "photos/passwords.png").write_text("root:x:0:0")
    with serve_files(root / "secrets") as address:
        paths = [
            f"{root}/secrets/00001.png",
            "../secrets/00002.png",
            "link.png",
            f"file://{root}/secrets/00003.png",
            f"{address}/00004.png",
            "passwords.png",
            *(f"{label}/{number:05d}.png" for label in ("red", "blue") for number in range(6)),
        ]
        rows = [f"k{number},{path},caption {number},{number % 2}" for number, path in enumerate(paths)]
        (root / "photos/t.csv").write_text("\n".join(["key,image,caption,label", *rows, ""]))
        extract(open_source(root / "photos/t.csv"), root / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    assert list(Cache(root / "cache").feature("image").failures) == [FAILED]
    build_index(root / "cache", root / "index", IndexSettings(feature="open_toy/cls"))
    (root / "keys.txt").write_text("".join(f"k{number}\n" for number in range(len(paths))))
    return root


@contextlib.contextmanager
def serve_files(folder: Path) -> Iterator[str]:
    """Serve files on this machine; yield the address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def crafted(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stranger's folder, with a copy of the cache, for a user who has extracted nothing."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shutil.rmtree(stranger / "copy", ignore_errors=True)
    for path in stranger.glob("out*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.copytree(stranger / "cache", stranger / "copy")
    return stranger


def opened_below(folder: Path, events: list[tuple[str, str]]) -> set[str]:
    """Return the files below a folder that were opened, links followed, relative to it."""
    paths = {os.path.realpath(path) for event, path in events if event == "open"}
    return {os.path.relpath(path, folder) for path in paths if path.startswith(f"{folder}/")}


def connections(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(event, place) for event, place in events if event != "open"]


def run(root: Path, name: str, *options: object) -> tuple[Result, list[tuple[str, str]]]:
    """Run a command on the crafted cache."""
    if name == "repair":
        (root / "copy/image/open_toy/cls/c/0/0").unlink()
    with recorded() as events, forked_workers():
        done = embedcache(*COMMANDS[name], *options, cwd=root)
    assert "Traceback" not in done.stderr, done.stderr
    return done, events


@pytest.mark.parametrize("name", COMMANDS)
def test_cache_of_a_stranger_reads_nothing(crafted: Path, name: str) -> None:
    done, events = run(crafted, name)
    is_page = "out.html" in COMMANDS[name]
    assert done.code == (0 if is_page else 1), done.stderr
    assert "you did not extract it on this machine; name its folder or URL with --image-folder" in done.stderr
    assert opened_below(crafted / "photos", events) == opened_below(crafted / "secrets", events) == set()
    assert connections(events) == []


@pytest.mark.parametrize("is_own", [False, True], ids=["named", "own"])
@pytest.mark.parametrize("name", COMMANDS)
def test_only_what_is_named_or_was_extracted_here_is_read(crafted: Path, name: str, is_own: bool) -> None:
    """Also of a cache that this user extracted, whose table named files elsewhere."""
    if is_own:
        info = Cache(crafted / "copy").info
        remember(info.source, info.index_digest)
    _, events = run(crafted, name, *([] if is_own else ["--image-folder", "photos"]))
    read = opened_below(crafted / "photos", events)
    assert "link.png" not in read
    assert opened_below(crafted / "secrets", events) == set()
    assert connections(events) == []
    if name in ("extract", "two devices"):  # whose worker processes have no hook
        failed = Cache(crafted / "copy").feature("image", "open_other/cls").failures
        assert list(failed) == list(range(NUM_HOSTILE + 1))
    elif name not in ("retry", "webdataset"):  # which read the failed item only, and end with the first one
        assert read - {"t.csv", "passwords.png"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("path", ["http://127.0.0.1:9/photos", "{}/secrets", "/"])
def test_source_elsewhere_is_not_asked(crafted: Path, name: str, path: str) -> None:
    source = {"type": "folder", "path": path.format(crafted), "settings": {}}
    edit_record(crafted / "copy/cache.json", source=source)
    done, events = run(crafted, name, "--image-folder", "photos")
    assert "the cache says that its source is " in done.stderr
    assert opened_below(crafted / "secrets", events) == set()
    assert connections(events) == []


@pytest.mark.parametrize("name", ["../secrets/00000.png", "/etc/passwd", "index/../../secrets/00000.png", "..", ""])
@pytest.mark.parametrize(
    ("manifest", "listed", "command"),
    [
        ("index/card.json", "index-0.faiss", ("search", "index", "--query-key", "k6")),
        (
            "copy/image/open_toy/chunks/00000.json",
            "cls/0",
            ("extract", "photos/t.csv", "copy", "--image-encoder", IMAGE),
        ),
    ],
)
def test_manifest_lists_files_of_its_folder_only(
    crafted: Path, manifest: str, listed: str, command: tuple[str, ...], name: str
) -> None:
    content = (crafted / manifest).read_bytes()
    edit_record(crafted / manifest, {f'"{listed}"': json.dumps(name)})
    with recorded() as events:
        done = embedcache(*command, cwd=crafted)
    (crafted / manifest).write_bytes(content)
    assert done.code == 1
    assert repr(name)[1:-1] in done.stderr, done.stderr
    assert opened_below(crafted / "secrets", events) == set()


def test_url_that_an_index_names_is_not_asked(crafted: Path) -> None:
    """A cache that the user names takes its place."""
    edit_record(crafted / "index/card.json", cache="http://127.0.0.1:9/cache")
    search = ("search", "index", "--query-key", "k6")
    with recorded() as events:
        refused = embedcache(*search, cwd=crafted)
        named = embedcache(*search, "--cache", "cache", cwd=crafted)
    edit_record(crafted / "index/card.json", cache="../cache")
    assert connections(events) == []
    assert (refused.code, named.code) == (1, 0)
    assert "--cache" in refused.stderr


LINKS = ("image", "image/open_toy", "image/open_toy/cls", "image/open_toy/cls/c", "image/open_toy/chunks", "records")
WRITERS = (
    ("extract", "photos/t.csv", "copy", "--image-encoder", "tests.toy:open_other"),
    ("extract", "photos/t.csv", "copy", "--image-encoder", IMAGE, "--retry-failed"),
    ("verify", "copy", "--repair", "--image-folder", "photos"),
    ("derive", "copy", "--rule", "pca", "--input", "image=open_toy/cls", "--name", "pca", "--parameter", "width=2"),
    ("cache", "remove", "copy", "keys.txt", "--yes"),
    ("cache", "prune", "copy", "--modality", "image", "--feature", "open_toy", "--yes"),
)


@pytest.mark.parametrize("place", [*LINKS, "image/open_toy/chunks/00000.txn", "image/open_toy/chunks/.lock"])
def test_links_inside_a_cache_are_not_followed_by_writers(crafted: Path, tmp_path: Path, place: str) -> None:
    """Each leads to a folder of the user's with all that the cache had there and files that the cache would delete."""
    link, outside = crafted / "copy" / place, tmp_path / "outside"
    if link.is_dir():
        shutil.copytree(link, outside)
        shutil.rmtree(link)
    for name in ("complete", "items-9.parquet", "00007.txn/complete"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text("the user's")
    link.unlink(missing_ok=True)
    link.symlink_to(outside / "new" if place.endswith(".lock") else outside)
    (crafted / "keys.txt").write_text("k6\n")

    def read_outside() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in outside.rglob("*")}

    before = read_outside()

    refusals = []
    for words in WRITERS:
        done = embedcache(*words, cwd=crafted)
        assert "Traceback" not in done.stderr, done.stderr
        assert read_outside() == before, words
        refusals += [done.stderr] if done.code else []
    assert any(f"{place}: " in refusal and "link" in refusal for refusal in refusals), refusals


def test_source_of_yours_takes_the_place_of_one_that_is_not_asked(crafted: Path) -> None:
    """It has the same samples: nothing is encoded, and the cache is known from then on."""
    path = crafted / "copy/cache.json"
    edit_record(path, source={"type": "table", "path": "http://127.0.0.1:9/t.csv", "settings": {}})
    with recorded() as events:
        done = embedcache("extract", "photos/t.csv", "copy", "--image-encoder", IMAGE, cwd=crafted)
    assert done.code == 0, done.stderr
    assert connections(events) == []
    assert json.loads(path.read_text())["source"]["path"] == str(crafted / "photos/t.csv")
    done, events = run(crafted, "outliers")
    assert done.code == 0, done.stderr
    assert "red/00000.png" in opened_below(crafted / "photos", events)
