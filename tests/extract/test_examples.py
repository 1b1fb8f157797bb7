import doctest
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.extract import extract, repair, settings
from tests.images import write_images

ENCODER = "embedcache.testing.examples:open_example"


@pytest.mark.parametrize("module", [extract, repair, settings])
def test_docstring_examples(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"), 12)
    (write_images(Path("downloads"), 12) / "00003.png").write_bytes(b"")
    embedcache.extract_features("photos", "cache", image_encoder=ENCODER, text_encoder=ENCODER)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
