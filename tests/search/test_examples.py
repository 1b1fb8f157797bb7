import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.search import faiss_index, index, queries, search, settings
from tests.images import write_images

ENCODER = "embedcache.testing.examples:open_example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of sixty images, a run that tells them apart, and its index."""
    path = tmp_path_factory.mktemp("examples")
    write_images(path / "photos", 60)
    embedcache.extract_features(path / "photos", path / "cache", image_encoder=ENCODER, text_encoder=ENCODER)
    embedcache.train_projectors(path / "cache", path / "run", split="key", epochs=20)
    embedcache.build_index(path / "cache", path / "index", run=path / "run")
    return path


@pytest.mark.parametrize("module", [faiss_index, index, queries, search, settings])
def test_docstring_examples(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
