"""Indexes of the shared caches."""

import json
from pathlib import Path

import pytest

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from tests.images import write_images
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="session")
def index_path(cache_path: Path, run_path: Path) -> Path:
    build_index(cache_path, run_path.parent / "index", IndexSettings(run=run_path))
    return run_path.parent / "index"


@pytest.fixture(scope="session")
def labeled_index(labeled: Path) -> Path:
    build_index(labeled, labeled.parent / "index", IndexSettings(feature="open_toy/cls"))
    return labeled.parent / "index"


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cats, with four captions, with two German and two others, and with none; and two dogs without captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for name, count in (("cat", 3), ("dog", 2)):
        for path in sorted(write_images(folder / "s" / name, count).glob("*.txt")):
            path.unlink()
    (folder / "s/cat/00000.txt").write_text("one\ntwo\nthree\nfour\n")
    (folder / "s/cat/00001.json").write_text(json.dumps({"caption": ["rot", "blau"], "language": "de"}))
    (folder / "s/cat/00001.txt").write_text("red\nblue\n")
    settings = ExtractSettings(chunk_size=4)
    extract(open_source(folder / "s"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"
