import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.maintain import copy, prune, remove, settings
from tests.maintain.cases import make_cache, write_source


@pytest.mark.parametrize("module", [copy, prune, remove, settings])
def test_docstring_examples(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_source(Path("source"))
    make_cache(source, Path("cache"))
    make_cache(source, Path("second-cache"))
    Path("selection.txt").write_text("00000\n00003-zebra\n")
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
