import doctest
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.curate import coverage, dedup, leaks, map, negatives, outliers, score, settings
from embedcache.curate.select import select


@pytest.mark.parametrize("module", [coverage, dedup, leaks, map, negatives, outliers, score, select, settings])
def test_docstring_examples(
    module: ModuleType, clear: Path, two_caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clear, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    for name, path in zip(("test-cache", "train-cache"), two_caches, strict=True):
        Path(name).symlink_to(path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
