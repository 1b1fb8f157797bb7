"""Tables of examples: items by key, words, draws and controls."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import normalize
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.networks.words import BLANK, UNKNOWN, Vocabulary
from embedcache.sources.base import FileItem, Sample, TextItem
from embedcache.store.cache import Cache
from embedcache.train.examples import WordTable, open_examples, open_media, open_word_table, read_captions, with_blanks
from tests.toy import IMAGE, TEXT
from tests.train.likelihood_cases import COLORS, Squares, SquaresSource, colors_of, open_tones

WORDS = Vocabulary(["a", "red", "what", "color"])


class Uneven:
    """Samples with two images, one, none, and one that is broken; of their captions two are blank."""

    captions: Mapping[str, tuple[str, ...]] = {"two": ("red", "b"), "one": ("a",), "none": (" ",), "broken": ("", "c")}

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.train.test_examples:Uneven", "path": "", "settings": {}}

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


def test_a_word_table_has_the_words_of_its_cache_in_order(
    squares: Squares, squares_paths: tuple[Path, Path, Path]
) -> None:
    texts = Cache(squares_paths[2]).items("text")["text"].to_pylist()
    assert list(squares.words.vocabulary.words) == texts
    assert squares.words.vectors_VD.shape == (len(texts), 32)
    with pytest.raises(UnknownNameError, match="no text features"):
        open_word_table(Cache(squares_paths[0]))


def test_examples_are_found_by_key_in_any_order(
    squares: Squares, squares_paths: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    media = open_media(Cache(squares_paths[0]), "image")
    table = pa.table({"key": ["7", "3", "7"], "target": ["red", "a red", "red"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "examples.parquet")
    for source in (table, tmp_path / "examples.parquet"):
        examples = open_examples(source, WORDS, media=media)
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
    table = pa.table({"key": keys, "target": keys})
    examples = open_examples(table, WORDS, media=media)
    assert examples.rows_N is not None
    assert (examples.rows_N.tolist(), examples.num_left_out) == ([2, 0], 2)
    assert examples.targets.take(examples.target_N).to_pylist() == ["one", "two"]
    assert open_examples(table, WORDS).num_left_out == 0
    with pytest.raises(DataError, match="expected at least one whose item has the feature, got none"):
        open_examples(table.take([1, 3]), WORDS, media=media)


def test_keys_of_other_caches_are_counted_and_three_are_named(uneven: Cache) -> None:
    keys = ["one", "w", "x", "x", "y", None, "z"]
    with pytest.raises(DataError) as caught:
        open_media(uneven, "image", "open_toy/cls").find_rows(pa.chunked_array([keys]))
    assert str(caught.value) == (
        f"{uneven.path}: expected keys of its samples, got 'w', 'x', 'y' and 6 rows in all without one; use the cache "
        "that the examples were made for"
    )


def test_media_are_in_memory_unless_asked_otherwise(uneven: Cache) -> None:
    for in_memory in (True, False):
        media = open_media(uneven, "image", "open_toy/cls", in_memory=in_memory)
        assert hasattr(media.read, "__self__") != in_memory  # a method of the feature, which reads from disk
    assert not hasattr(open_media(uneven, "image", "open_toy/cls").read, "__self__")
    assert open_media(uneven, "image", "open_toy/patches+open_toy/patches").axis is None  # of several features


@pytest.mark.parametrize("listed", [["a"], ["a", "red", "b"]])
def test_texts_have_the_mean_of_their_words(listed: list[str]) -> None:
    vectors = np.random.default_rng(0).standard_normal((len(listed), 4)).astype(np.float16)
    vocabulary = Vocabulary(listed)
    table = WordTable(vocabulary=vocabulary, vectors_VD=vectors, feature=None, index_digest="")  # type: ignore[arg-type]
    texts = ["a", "a red other _ a", "other", "b red", None]
    unit = dict(zip(listed, normalize(vectors.astype(np.float32)), strict=True))
    expected = []
    for text in texts:
        known = [unit[word] for word in (text or "").split() if word in unit]
        expected.append(normalize(np.sum(known, axis=0, keepdims=True))[0] if known else np.zeros(4))
    np.testing.assert_allclose(table.average(vocabulary.encode(texts)), expected, atol=1e-6)


def test_null_texts_have_no_words_and_unknown_ones_are_counted() -> None:
    table = pa.table({"text": ["What color?", None], "target": ["red", "blue"]})
    examples = open_examples(table, WORDS)
    assert examples.text_words is not None
    assert examples.text_words.lengths().tolist() == [2, 0]
    assert examples.unknown_fraction == 1 / 4
    assert examples.target_words.numbers_M.tolist() == [4, UNKNOWN]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"key": ["0"]}, "columns key, text and target"),
        ({"key": ["0"], "target": pa.nulls(1, pa.string())}, "1 row without"),
        ({"key": ["0", "x", None], "target": ["a"] * 3}, "'x'"),
        ({"target": ["a"]}, "columns key"),
    ],
)
def test_bad_tables_are_refused(table: dict[str, object], message: str, squares_paths: tuple[Path, Path, Path]) -> None:
    with pytest.raises(DataError, match=message):
        open_examples(pa.table(table), WORDS, media=open_media(Cache(squares_paths[0]), "image"))


def test_texts_are_no_media_and_files_must_exist(squares_paths: tuple[Path, Path, Path]) -> None:
    with pytest.raises(SettingError, match="texts are columns of examples"):
        open_media(Cache(squares_paths[0]), "text")
    with pytest.raises(PathError, match=r"none\.parquet"):
        open_examples("none.parquet", WORDS)


def test_draws_of_one_seed_are_nested(squares: Squares) -> None:
    examples = squares.train["answer"]
    sizes = []
    before: set[int] = set()
    for fraction in (0.001, 0.1, 0.5, 1.0):
        drawn = examples.draw(fraction, seed=1)
        assert drawn.rows_N is not None
        rows = set(drawn.rows_N.tolist())
        assert before <= rows
        before = rows
        sizes.append(len(drawn))
        assert drawn.text_words is not None
        assert drawn.text_words.num_texts == len(drawn)
    assert sizes == [1, 6, 30, 60]
    for fraction in (0, 1.5):
        with pytest.raises(SettingError, match=f"fraction: expected a number above 0 and up to 1, got {fraction}$"):
            examples.draw(fraction, seed=1)


def test_spread_examples_are_the_first_the_last_and_some_between(squares: Squares) -> None:
    examples = squares.train["captions"].take(np.arange(7))
    assert examples.rows_N is not None
    for limit, expected in ((3, [0, 3, 6]), (4, [0, 2, 4, 6]), (1, [0])):
        found = examples.spread(limit).rows_N
        assert found is not None
        assert found.tolist() == examples.rows_N[expected].tolist()
    assert examples.spread(7) is examples


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
    with pytest.raises(DataError, match="expected examples about items, got texts alone"):
        examples.without_media().shuffle_media(seed=0)


def test_captions_of_a_cache_are_examples(squares_paths: tuple[Path, Path, Path]) -> None:
    cache = Cache(squares_paths[0])
    table = read_captions(cache)
    assert table.column_names == ["key", "target"]
    assert len(table) == cache.info.num_items["text"]


def test_blank_captions_are_no_examples(uneven: Cache) -> None:
    found = read_captions(uneven)
    assert found.to_pydict() == {"key": ["two", "two", "one", "broken"], "target": ["red", "b", "a", "c"]}


def test_recordings_are_media_with_an_axis(squares: Squares, tmp_path: Path) -> None:
    tones = open_tones(tmp_path / "tones", squares.words.vocabulary)
    assert tones.media is not None
    assert tones.media.axis is not None
    assert tones.media.axis.rate_hz == 50.0


def test_blanks_are_added_where_there_is_none() -> None:
    texts = with_blanks(WORDS.encode(["what color", "a _ red", None]))
    assert texts.padded()[0].tolist() == [[5, 6, BLANK], [3, BLANK, 4], [BLANK, 1, 1]]
    with pytest.raises(DataError, match="at most one blank, got 2 in example 1"):
        with_blanks(WORDS.encode(["a", "_ _"]))
