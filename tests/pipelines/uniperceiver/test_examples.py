"""Examples of tasks, and words as numbers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedcache.errors import DataError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.store.cache import Cache
from pipelines.uniperceiver.examples import open_examples, open_media
from pipelines.uniperceiver.words import BLANK, END, NUM_SPECIAL, UNKNOWN, Vocabulary, list_words, with_blanks
from pipelines.worlds.examples import make_examples
from tests.pipelines.uniperceiver.cases import COLORS, IMAGE_TOKENS, Squares, SquaresSource, colors_of
from tests.toy import IMAGE, TEXT

WORDS = Vocabulary(["a", "red", "what", "color"])


class Uneven:
    """Samples with two images, one, none, and one that is broken; of their captions two are blank."""

    captions: Mapping[str, tuple[str, ...]] = {"two": ("red", "b"), "one": ("a",), "none": (" ",), "broken": ("", "c")}

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.pipelines.uniperceiver.test_examples:Uneven", "path": "", "settings": {}}

    def samples(self) -> Iterator[Sample]:
        names = {"two": ("1", "2"), "one": ("3",), "none": (), "broken": ("x",)}
        for key, texts in self.captions.items():
            images = tuple(FileItem(path=f"{name}.png", length=len(self._bytes(name))) for name in names[key])
            yield Sample(key=key, images=images, texts=tuple(TextItem(text=text) for text in texts))

    def read(self, item: FileItem) -> bytes:
        return self._bytes(item.path.partition(".")[0])

    def _bytes(self, name: str) -> bytes:
        return b"junk" if name == "x" else SquaresSource(9).read(FileItem(path=f"{name}.png", length=0))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of these samples. Not to be changed."""
    path = tmp_path_factory.mktemp("uneven") / "cache"
    settings = ExtractSettings(features=("cls", "patches", "mean"))
    extract(Uneven(), path, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return Cache(path)


def test_examples_are_found_by_key_in_any_order(squares: Squares, squares_paths: tuple[Path, Path, Path]) -> None:
    media = open_media(Cache(squares_paths[0]), "image", IMAGE_TOKENS)
    table = make_examples(keys=["7", "3", "7"], targets=["red", "a red", "red"])
    examples = open_examples(table, WORDS, media=media)
    assert examples.rows_N is not None
    assert examples.rows_N.tolist() == [7, 3, 7]
    assert examples.targets.take(examples.target_N).to_pylist() == ["red", "a red", "red"]
    assert len(examples.targets) == 2
    assert examples.text_words is None
    colors = np.round(media.read(examples.rows_N).values.astype(np.float32)[:, 0]).argmax(axis=1)
    assert [list(COLORS)[place] for place in colors] == [colors_of(key)[0] for key in (7, 3, 7)]
    assert squares.train["captions"].digest != squares.valid["captions"].digest


def test_examples_are_about_the_first_item_that_has_the_feature(uneven: Cache) -> None:
    media = open_media(uneven, "image", "open_toy/cls")
    keys = ["one", "broken", "two", "none"]
    assert media.find_rows(pa.chunked_array([keys])).tolist() == [2, -1, 0, -1]
    table = make_examples(keys=keys, targets=keys)
    examples = open_examples(table, WORDS, media=media)
    assert examples.rows_N is not None
    assert examples.rows_N.tolist() == [2, 0]
    assert examples.targets.take(examples.target_N).to_pylist() == ["one", "two"]
    assert len(open_examples(table, WORDS)) == 4
    with pytest.raises(DataError, match="got none"):
        open_examples(table.take([1, 3]), WORDS, media=media)
    with pytest.raises(DataError, match="'w'"):
        media.find_rows(pa.chunked_array([["one", "w"]]))


def test_shuffled_media_are_those_of_others_and_the_same_for_one_item(squares: Squares) -> None:
    examples = squares.train["captions"].take(np.array([4, 1, 4, 9]))
    shuffled = examples.shuffle_media(seed=0)
    assert examples.rows_N is not None
    assert shuffled.rows_N is not None
    assert (shuffled.rows_N != examples.rows_N).all()
    assert shuffled.rows_N[0] == shuffled.rows_N[2]
    assert sorted(set(shuffled.rows_N.tolist())) == [1, 4, 9]
    assert examples.without_media().media is None
    swapped = examples.take(np.array([1, 3, 1])).shuffle_media(seed=0)
    assert swapped.rows_N is not None
    assert swapped.rows_N.tolist() == [9, 1, 9]
    with pytest.raises(DataError, match="about at least two items, got 1$"):
        examples.take(np.array([0, 2])).shuffle_media(seed=0)


def test_blanks_are_added_where_there_is_none() -> None:
    texts = with_blanks(WORDS.encode(["what color", "a _ red", None]))
    assert texts.padded()[0].tolist() == [[5, 6, BLANK], [3, BLANK, 4], [BLANK, 1, 1]]
    with pytest.raises(DataError, match="at most one blank, got 2 in example 1"):
        with_blanks(WORDS.encode(["a", "_ _"]))


KNOWN_WORDS = Vocabulary(["a", "red", "circle", "isn't"])


def test_texts_become_numbers_and_back() -> None:
    lists = KNOWN_WORDS.encode(pa.chunked_array([["A red, RED circle!", None], ["", "isn't _ blue?"]]))
    assert lists.lengths().tolist() == [4, 0, 0, 3]
    assert lists.numbers_M.tolist() == [3, 4, 4, 5, 6, BLANK, UNKNOWN]
    assert lists.numbers_M.dtype == np.int32
    assert KNOWN_WORDS.decode(np.array([3, 4, 5, END, 3])) == "a red circle"
    assert KNOWN_WORDS.decode(lists.take(np.array([3])).numbers_M) == "isn't _ ?"


def test_words_are_listed_by_frequency() -> None:
    assert list_words(["b a", "a _ c", "a b", "d"]) == ["a", "b", "c", "d"]
    assert list_words([]) == []


def test_candidates_need_known_words() -> None:
    assert KNOWN_WORDS.require_known(["red circle"], "classes").numbers_M.tolist() == [NUM_SPECIAL + 1, NUM_SPECIAL + 2]
    with pytest.raises(DataError, match=r"classes: .*'a blue circle'"):
        KNOWN_WORDS.require_known(["red", "a blue circle"], "classes")
    with pytest.raises(DataError, match="answers: .*words"):
        KNOWN_WORDS.require_known(["?"], "answers")
