import doctest
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache import (
    arrays,
    errors,
    files,
    inference,
    metrics,
    modalities,
    processes,
    progress,
    provenance,
    registry,
    settings,
)
from embedcache.testing import classifiers, encoders, losses, projectors, selectors, sources
from tests.images import write_images


@pytest.mark.parametrize(
    "module",
    [arrays, files, metrics, modalities, processes, progress, provenance, registry, settings],
)
def test_docstring_examples(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_examples_of_models_run(
    image_folder: Path, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").symlink_to(image_folder)
    (tmp_path / "run").symlink_to(run_path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(inference, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed


def test_examples_of_errors_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = "embedcache.testing.examples:open_example"
    write_images(Path("photos"), 12)
    write_images(Path("other-photos"), 12, seed=1)
    Path("empty").mkdir()
    embedcache.extract_features("photos", "cache", image_encoder=encoder)
    embedcache.extract_features("photos", "views-cache", image_encoder=encoder, view="flip")
    embedcache.extract_features("photos", "half-cache", image_encoder=encoder, chunk_size=4, shard="0/2")
    shutil.copytree("cache", "damaged-cache")
    Path("damaged-cache/image/open_example/vector/c/0/0").write_bytes(b"damaged")
    result = doctest.testmod(errors, extraglobs={"embedcache": embedcache}, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("module", [classifiers, encoders, losses, projectors, selectors, sources])
def test_examples_of_contracts_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
