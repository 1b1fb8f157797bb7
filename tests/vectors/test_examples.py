import doctest
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.vectors import exporting, importing, opening, settings


@pytest.mark.parametrize("module", [exporting, importing, opening, settings])
def test_docstring_examples(module: ModuleType, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(labeled, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
