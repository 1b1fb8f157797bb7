"""Indexes of the shared caches."""

import json
from pathlib import Path

import pytest

from embedcache.extract.extract import extract
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
def in_two_languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of twelve images, of which the first four have a German caption, and an index of each modality."""
    folder = tmp_path_factory.mktemp("languages")
    write_images(folder / "photos", 12)
    for path in sorted((folder / "photos").glob("*.txt"))[:4]:
        path.with_suffix(".json").write_text(json.dumps({"caption": f"rot {path.stem}", "language": "de"}))
    extract(open_source(folder / "photos"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    for modality in ("image", "text"):
        build_index(folder / "cache", folder / modality, IndexSettings(modality=modality))
    return folder
