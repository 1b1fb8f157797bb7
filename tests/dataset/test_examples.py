import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.dataset import inputs, settings, where


@pytest.mark.parametrize("module", [inputs, settings, where])
def test_docstring_examples(module: ModuleType, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flickr").symlink_to(labeled)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
