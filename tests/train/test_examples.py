"""Tables of examples: items by key, words, draws and controls."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.networks.words import BLANK, UNKNOWN, Vocabulary
from embedcache.store.cache import Cache
from embedcache.train.examples import open_examples, open_media, open_word_table, read_captions, with_blanks
from tests.train.likelihood_cases import COLORS, Squares, colors_of, open_tones

WORDS = Vocabulary(["a", "red", "what", "color"])


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
        ({"key": ["0"], "target": pa.nulls(1, pa.string())}, "1 rows without"),
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
    with pytest.raises(SettingError, match="fraction"):
        examples.draw(0, seed=1)


def test_shuffled_media_are_those_of_others_and_the_same_for_one_item(squares: Squares) -> None:
    examples = squares.train["captions"].take(np.array([4, 1, 4, 9]))
    shuffled = examples.shuffle_media(seed=0)
    assert examples.rows_N is not None
    assert shuffled.rows_N is not None
    assert (shuffled.rows_N != examples.rows_N).all()
    assert shuffled.rows_N[0] == shuffled.rows_N[2]
    assert sorted(set(shuffled.rows_N.tolist())) == [1, 4, 9]
    assert examples.without_media().media is None
    with pytest.raises(DataError, match="at least two"):
        examples.take(np.array([0])).shuffle_media(seed=0)


def test_captions_of_a_cache_are_examples(squares_paths: tuple[Path, Path, Path]) -> None:
    cache = Cache(squares_paths[0])
    table = read_captions(cache)
    assert table.column_names == ["key", "target"]
    assert read_captions(cache, part="train").equals(table)
    assert len(read_captions(cache, part="test")) == 0
    with pytest.raises(DataError, match="column split"):
        read_captions(Cache(squares_paths[2]), part="test")


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
