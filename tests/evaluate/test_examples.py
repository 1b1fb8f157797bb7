import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.evaluate import encoder_pairs, probe, retrieval, runs, settings, zero_shot
from tests.images import COLORS


@pytest.mark.parametrize("module", [encoder_pairs, probe, retrieval, runs, settings, zero_shot])
def test_docstring_examples(
    module: ModuleType,
    cache_path: Path,
    run_path: Path,
    labeled_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, path in (("cache", cache_path), ("run", run_path), ("labeled", labeled_path)):
        (tmp_path / name).symlink_to(path)
    (tmp_path / "colors.txt").write_text("\n".join(COLORS))
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
