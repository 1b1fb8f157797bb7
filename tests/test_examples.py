import doctest
from pathlib import Path
from types import ModuleType

import pytest

from embedcache import arrays, errors, files, metrics, modalities, processes, progress, provenance, registry, settings


@pytest.mark.parametrize(
    "module",
    [arrays, errors, files, metrics, modalities, processes, progress, provenance, registry, settings],
)
def test_docstring_examples(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
