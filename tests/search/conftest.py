"""Indexes of the shared caches."""

from pathlib import Path

import pytest

from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings


@pytest.fixture(scope="session")
def index_path(cache_path: Path, run_path: Path) -> Path:
    build_index(cache_path, run_path.parent / "index", IndexSettings(run=run_path))
    return run_path.parent / "index"


@pytest.fixture(scope="session")
def labeled_index(labeled: Path) -> Path:
    build_index(labeled, labeled.parent / "index", IndexSettings(feature="open_toy/cls"))
    return labeled.parent / "index"
