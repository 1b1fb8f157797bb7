"""A run and an index of the shared cache, and a cache with labels and splits."""

from pathlib import Path

import pytest

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.search.index import build_index
from embedcache.sources import open_source
from tests.evaluate.test_retrieval import train_run
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="session")
def run_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(cache_path, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def index_path(cache_path: Path, run_path: Path) -> Path:
    build_index(cache_path, run_path.parent / "index", run_path=run_path)
    return run_path.parent / "index"


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in two splits and two classes, in chunks of 16. Not to be changed."""
    folder = tmp_path_factory.mktemp("labeled")
    for number, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        write_pictures(folder / "s" / name, 15, seed=number)
    settings = ExtractSettings(chunk_size=16)
    extract(
        open_source(folder / "s"), folder / "cache", image_encoders=[IMAGE], text_encoders=[TEXT], settings=settings
    )
    return folder / "cache"


@pytest.fixture(scope="session")
def labeled_index(labeled: Path) -> Path:
    build_index(labeled, labeled.parent / "index", feature="open_toy/cls")
    return labeled.parent / "index"
