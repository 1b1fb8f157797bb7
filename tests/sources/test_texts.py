from pathlib import Path

import pytest

from embedcache.errors import SourceError
from embedcache.sources import Source, open_source
from embedcache.testing.sources import SourceContract
from tests.sources.files import write

TEXTS = ["a photo of a cat", "ein Käse", "猫"]


class TestTextFile(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write(tmp_path, {"prompts.txt": "\n".join(TEXTS)}) / "prompts.txt")


def test_one_sample_per_line(tmp_path: Path) -> None:
    write(tmp_path, {"p.txt": "\ufeffone \r\n\r\nthree\n"})
    samples = list(open_source(tmp_path / "p.txt").samples())
    assert [item.text for sample in samples for item in sample.texts] == ["one", "", "three"]
    assert [sample.key for sample in samples] == ["p/0", "p/1", "p/2"]


@pytest.mark.parametrize(("name", "words"), [("t.npy", "expected a file of texts"), ("t.txt", "t.txt .*as UTF-8")])
def test_other_files_raise(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path, {name: b"\xff"})
    with pytest.raises(SourceError, match=words):
        list(open_source(f"texts:{tmp_path / name}").samples())
