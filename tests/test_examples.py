import doctest
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


@pytest.mark.parametrize(
    "module",
    [arrays, errors, files, metrics, modalities, processes, progress, provenance, registry, settings],
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
