"""The parts of a server over small caches, queried through the real app behind its guard."""

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from embedcache.curate.coverage import measure_coverage
from embedcache.curate.map import build_map
from embedcache.curate.settings import MapSettings
from embedcache.extract.extract import extract
from embedcache.progress import NullProgress
from embedcache.provenance import write_report_json
from embedcache.reports.coverage import coverage_json
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.serve.app import make_app
from embedcache.serve.guard import RequestGuard
from embedcache.serve.server import bind, config
from embedcache.serve.service import SearchService, ServePaths, open_service
from embedcache.serve.settings import ServeSettings
from embedcache.sources import open_source
from tests.evaluate.test_retrieval import train_run
from tests.images import write_images
from tests.media_files import encode_audio, encode_video, moving_square, tone
from tests.media_toy import MEDIA
from tests.toy import IMAGE, TEXT

PORT = 8000
ROWS = [
    {"key": "whole", "audio": "tone.flac", "text": "red"},
    {"key": "part", "audio": "tone.flac", "start_s": 0.5, "stop_s": 0.75, "text": "blue"},
    {"key": "film", "video": "square.webm", "start_s": 0.2, "stop_s": 0.6, "text": "green"},
    {"key": "old", "video": "square.avi", "text": "black"},
    {"key": "words", "text": "white"},
]


def visit(served: SearchService, *, token: str | None = None) -> TestClient:
    """Open a client of the app behind its guard; use it with `with`."""
    guard = RequestGuard(make_app(served), served.settings, token=token, port=PORT)
    return TestClient(guard, base_url=f"http://127.0.0.1:{PORT}", follow_redirects=False)


@contextmanager
def running(served: SearchService) -> Iterator[int]:
    """Run a server in a thread; yield its port."""
    with bind(ServeSettings(port=0)) as bound:
        port = bound.getsockname()[1]
        server = uvicorn.Server(config(RequestGuard(make_app(served), served.settings, token=None, port=port)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty captioned images in two splits and two classes, with a run, an index and concepts. Not to be changed."""
    root = tmp_path_factory.mktemp("serve")
    for number, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        folder = write_images(root / "photos" / name, 20, seed=number)
        for path in sorted(folder.glob("*.txt"))[:5]:
            english = path.read_text().strip()
            path.with_suffix(".json").write_text(json.dumps({"caption": f"{english} auf deutsch", "language": "de"}))
    extract(open_source(root / "photos"), root / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    train_run(root / "cache", root / "run")
    build_index(root / "cache", root / "index", IndexSettings(run=root / "run"))
    build_map(root / "index", MapSettings(projection="pca"))
    build_index(root / "cache", root / "plain", IndexSettings(feature="open_toy/cls"))
    prompts = {"red": ["red bar left on white"], "sky": ["blue bar top on white"]}
    (root / "concepts.json").write_text(json.dumps(prompts))
    extract(open_source(f"prompts:{root / 'concepts.json'}"), root / "concepts", text_encoder=[TEXT])
    report = measure_coverage(root / "cache", root / "concepts", run=root / "run", k=24)
    write_report_json(root / "coverage.json", coverage_json(report))
    key = open_source(root / "photos").samples()
    (root / "few.txt").write_text("".join(f"{sample.key}\n" for sample, _ in zip(key, range(7), strict=False)))
    return root


@pytest.fixture(scope="session")
def served(root: Path) -> SearchService:
    places = ServePaths(index=root / "index", coverage=root / "coverage.json", selections=[root / "few.txt"])
    return open_service(places, ServeSettings(max_upload=200_000), device="cpu", progress=NullProgress())


@pytest.fixture(scope="module")
def client(served: SearchService) -> Iterator[TestClient]:
    with visit(served) as client:
        yield client


def write_media(folder: Path) -> Path:
    """Write a recording, two videos, and a table of both and intervals of them."""
    folder.mkdir()
    (folder / "tone.flac").write_bytes(encode_audio(tone(1.5), "flac"))
    (folder / "square.webm").write_bytes(encode_video(moving_square(25), kind="webm"))
    (folder / "square.avi").write_bytes(encode_video(moving_square(25), kind="avi"))
    with (folder / "table.csv").open("w") as file:
        table = csv.DictWriter(file, ["key", "audio", "video", "start_s", "stop_s", "text"])
        table.writeheader()
        table.writerows(ROWS)
    return folder


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings and videos, two of them intervals, with an index of each modality. Not to be changed."""
    root = tmp_path_factory.mktemp("media")
    source = open_source(write_media(root / "files") / "table.csv")
    extract(source, root / "cache", encoder={"audio": [MEDIA], "video": [MEDIA], "text": [TEXT]})
    for modality, feature in (("audio", "open_media/mean"), ("video", "open_media/mean"), ("text", "open_toy/mean")):
        build_index(root / "cache", root / modality, IndexSettings(feature=feature, modality=modality))
    return root
