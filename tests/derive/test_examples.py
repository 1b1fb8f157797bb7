import doctest
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.derive import derive, rules


@pytest.mark.parametrize("module", [derive, rules])
def test_docstring_examples(
    module: ModuleType, cache_path: Path, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cache_path, tmp_path / "cache")
    (tmp_path / "run").symlink_to(run_path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
