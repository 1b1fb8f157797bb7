from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import SourceError
from embedcache.sources import Sample, Source, open_source
from embedcache.testing.sources import SourceContract
from tests.images import write_images
from tests.sources.files import write

TEXTS = ["a photo of a cat", "ein Käse", "猫"]


class TestTextFile(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write(tmp_path, {"prompts.txt": "\n".join(TEXTS)}) / "prompts.txt")


class TestArray(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(save(tmp_path, np.array(TEXTS)))


def save(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "t.npy", array)
    return folder / "t.npy"


def texts(samples: list[Sample]) -> list[str]:
    return [item.text for sample in samples for item in sample.texts]


def test_one_sample_per_line(tmp_path: Path) -> None:
    write(tmp_path, {"p.txt": "\ufeffone \r\n\r\nthree\n"})
    samples = list(open_source(tmp_path / "p.txt").samples())
    assert texts(samples) == ["one", "", "three"]
    assert [sample.key for sample in samples] == ["p/0", "p/1", "p/2"]


@pytest.mark.slow
@given(expected=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]))), as_bytes=st.booleans())
def test_array_strings_in_order(tmp_path_factory: pytest.TempPathFactory, expected: list[str], as_bytes: bool) -> None:
    array = np.array([text.encode() for text in expected], "S") if as_bytes else np.array(expected, "U")
    path = save(tmp_path_factory.mktemp("texts"), array)
    samples = list(open_source(path).samples())
    assert texts(samples) == expected
    assert [sample.key for sample in samples] == [f"t/{row}" for row in range(len(expected))]


def test_several_batches_in_order(tmp_path: Path) -> None:
    expected = [str(row) for row in range(3000)]
    assert texts(list(open_source(save(tmp_path, np.array(expected))).samples())) == expected


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array(["a", None], object), "pickled objects.*dtype=str"),
        (np.arange(3), r"expected strings of shape \(N,\), got int64 of shape \(3,\)"),
        (np.array([["a"]]), r"got <U1 of shape \(1, 1\)"),
        (np.array("a"), r"of shape \(\)"),
        (np.array([b"\xff"]), "UTF-8"),
    ],
)
def test_other_arrays_raise(tmp_path: Path, array: np.ndarray, words: str) -> None:
    path = save(tmp_path, array)
    with pytest.raises(SourceError, match=rf"t\.npy.*{words}"):
        list(open_source(path).samples())


@pytest.mark.parametrize("length", [0, 4, 40, 130])
def test_damaged_array_raises(tmp_path: Path, length: int) -> None:
    path = save(tmp_path, np.array(TEXTS))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SourceError, match=r"t\.npy.*damaged"):
        list(open_source(path).samples())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, 3)
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
