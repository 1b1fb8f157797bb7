"""Texts with labels, lists of words, examples, and sets of real images and recordings."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import ItemError, SettingError, UnknownNameError
from embedcache.sources import FileItem, Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.worlds.examples import (
    caption_examples,
    draw_examples,
    in_split,
    label_examples,
    make_examples,
    write_examples,
)
from pipelines.worlds.label_sets import (
    EMOJI_KIND,
    FASHION_FOLDER,
    FASHION_KIND,
    FASHION_LABELS,
    LETTERS_KIND,
    draw_labels,
)
from pipelines.worlds.shapes import KIND as SHAPES_KIND
from pipelines.worlds.talking_recordings import RECORDINGS
from pipelines.worlds.texts import CLASSES, collect_words, frequent_words, load_descriptions

HAS_LETTERS = Path(RECORDINGS["klettres-us"].folders["LETTERS"]).parent.is_dir()
needs_fashion = pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
needs_letters = pytest.mark.skipif(not HAS_LETTERS, reason="needs Debian's klettres-data")


class TestEmoji(SourceContract):
    @pytest.fixture
    def source(self) -> Source:
        return open_source("3", kind=EMOJI_KIND)


@pytest.mark.slow
@needs_fashion
class TestFashion(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("3+2", kind=FASHION_KIND)


@pytest.mark.slow
@needs_letters
class TestLetters(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("klettres-us", kind=LETTERS_KIND)

    def test_each_letter_is_there_once(self, source: Source) -> None:
        samples = list(source.samples())
        assert [sample.columns["label"] for sample in samples] == list("abcdefghijklmnopqrstuvwxyz")
        assert source.read(samples[0].files["audio"][0])[:4] == b"RIFF"

    def test_unknown_names_are_refused(self, source: Source) -> None:
        with pytest.raises(ItemError, match=r"SPEAKER/LETTER\.wav, got nobody/a\.wav"):
            source.read(FileItem(path="nobody/a.wav"))
        with pytest.raises(UnknownNameError, match="nobody"):
            open_source("nobody", kind=LETTERS_KIND)


@pytest.mark.slow
@needs_fashion
def test_fashion_has_words_as_labels_and_a_validation_part() -> None:
    examples = label_examples(open_source("100+50", kind=FASHION_KIND))
    assert Counter(examples["split"].to_pylist()) == {"train": 90, "valid": 10, "test": 50}
    assert set(examples["target"].to_pylist()) == set(FASHION_LABELS)
    drawn = draw_labels(examples, 0.001, seed=0)  # of 60,000
    assert len(drawn) == 60
    assert set(drawn["split"].to_pylist()) == {"train"}
    assert len(draw_labels(examples, 0.01, seed=0)) == 90  # all that are there
    with pytest.raises(SettingError, match="above 0, up to 1, got 60"):
        draw_labels(examples, 60, seed=0)


@pytest.mark.parametrize(("location", "kind"), [("3", FASHION_KIND), ("x", EMOJI_KIND)])
def test_wrong_locations_are_refused(location: str, kind: str) -> None:
    with pytest.raises(SettingError, match=f"got '{location}'"):
        open_source(location, kind=kind)


@pytest.mark.slow
def test_descriptions_do_not_name_what_is_to_be_found() -> None:
    descriptions = load_descriptions()
    texts = descriptions["text"].to_pylist()
    assert len(set(texts)) == len(texts) > 2500
    assert all(target not in text for text, target in zip(texts, descriptions["target"].to_pylist(), strict=True))
    counts = Counter(zip(descriptions["target"].to_pylist(), descriptions["split"].to_pylist(), strict=True))
    assert {name for name, _ in counts} == set(CLASSES)
    for name in CLASSES:
        total = sum(counts[name, part] for part in ("train", "valid", "test"))
        assert all(abs(counts[name, part] - total / 10) <= 1 for part in ("valid", "test"))
    assert descriptions.equals(load_descriptions())
    assert Counter(load_descriptions(max_per_class=10)["split"].to_pylist()) == {"train": 384, "valid": 48, "test": 48}


@pytest.mark.slow
def test_word_list_begins_with_the_words_of_the_texts() -> None:
    assert collect_words(["a red circle", "Red, or blue?"]) == ["red", "a", "blue", "circle", "or"]
    words = collect_words(["zzyzx red"], num_words=50)
    assert words[:2] == ["red", "zzyzx"]
    assert len(set(words)) == len(words) == 50
    assert words[2:] == [word for word in frequent_words() if word != "red"][:48]
    with pytest.raises(SettingError, match="at least the 2 words of the texts, got 1"):
        collect_words(["a b"], num_words=1)


def test_examples_of_a_source(tmp_path: Path) -> None:
    source = open_source("train=5,valid=2,test=0,unseen=0", kind=SHAPES_KIND)
    captions, labels = caption_examples(source), label_examples(source)
    samples = list(source.samples())
    assert captions["target"].to_pylist() == [text.text for sample in samples for text in sample.texts]
    assert labels["key"].to_pylist() == [sample.key for sample in samples if sample.columns["label"]]
    assert captions["text"].null_count == len(captions)
    assert in_split(captions, "valid").equals(caption_examples(source, split="valid"))
    write_examples(tmp_path / "new" / "captions.parquet", captions)
    assert pq.read_table(tmp_path / "new" / "captions.parquet").equals(captions)
    with pytest.raises(SettingError, match="expected the columns key, text, target first, got target"):
        write_examples(tmp_path / "wrong.parquet", captions.select(["target"]))


def test_draw_keeps_fractions_of_strata() -> None:
    examples = make_examples(targets=["a"] * 60 + ["b"] * 30 + ["c"] * 10, columns={"kind": ["x", None] * 50})
    for count in (1, 10, 35, 100):
        drawn = draw_examples(examples, count, seed=0, by=("target", "kind"))
        found = Counter(drawn["target"].to_pylist())
        assert sum(found.values()) == count
        assert all(abs(found[name] - count * whole / 100) <= 2 for name, whole in (("a", 60), ("b", 30), ("c", 10)))
    assert draw_examples(examples, 100, seed=0).equals(examples)
    for count, message in ((101, "1 to 100 examples to draw, got 101"), (0, "got 0")):
        with pytest.raises(SettingError, match=message):
            draw_examples(examples, count, seed=0)
    with pytest.raises(SettingError, match="a column of key, text, target, kind, got 'color'"):
        draw_examples(examples, 1, seed=0, by=("color",))


def test_example_columns_are_texts() -> None:
    examples = make_examples(targets=["a"])
    assert examples.schema.types == [pa.string()] * 3
