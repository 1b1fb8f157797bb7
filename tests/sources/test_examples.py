import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.sources import media, open
from tests.images import write_images


@pytest.mark.parametrize("module", [media, open])
def test_docstring_examples(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"), 2)
    Path("photos.csv").write_text("photo,title\nphotos/00000.png,a red box\nphotos/00001.png,a boat\n")
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
