import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.sweep import report, settings, sweep
from tests.images import write_images

ENCODER = "embedcache.testing.examples:open_example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and a space, of which the first example that runs makes a study. The others reuse it."""
    path = tmp_path_factory.mktemp("examples")
    write_images(path / "photos", 60)
    embedcache.extract_features(path / "photos", path / "cache", image_encoder=ENCODER, text_encoder=ENCODER)
    (path / "space.toml").write_text('[fixed]\nsplit = "key"\nepochs = 1\n[space]\nlr = [0.001, 0.01]')
    return path


@pytest.mark.parametrize("module", [report, settings, sweep])
def test_docstring_examples(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
