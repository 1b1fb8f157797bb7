from pathlib import Path

import pytest

from embedcache.errors import SourceError
from embedcache.sources import Source, open_source
from embedcache.testing.sources import SourceContract
from tests.pictures import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path, 3)
    (tmp_path / "00001.txt").write_text("one\ntwo\n")
    (tmp_path / "00002.txt").unlink()
    return tmp_path


class TestPairs(SourceContract):
    @pytest.fixture
    def source(self, folder: Path) -> Source:
        return open_source(f"pairs:{folder}")


def test_pairs_have_one_caption_each(folder: Path) -> None:
    before = {sample.key: sample for sample in open_source(folder).samples()}
    found = list(open_source(f"pairs:{folder}").samples())
    assert [(sample.columns["sample"], [item.text for item in sample.texts]) for sample in found] == [
        (key, [item.text]) for key, sample in before.items() for item in sample.texts
    ]
    assert len(found) == sum(len(sample.texts) for sample in before.values())
    assert all(sample.images == before[str(sample.columns["sample"])].images for sample in found)


def test_pairs_of_pairs_raise(folder: Path) -> None:
    with pytest.raises(SourceError, match="already has one caption per sample"):
        open_source(f"pairs:pairs:{folder}")
