import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.export import export, settings


@pytest.mark.parametrize("module", [export, settings])
def test_docstring_examples(
    module: ModuleType, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").symlink_to(run_path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
