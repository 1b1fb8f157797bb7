"""Texts with labels, lists of words, examples, and sets of real images and recordings."""

from collections import Counter
from pathlib import Path

import pytest

from embedcache.errors import SettingError
from embedcache.sources import Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.worlds.examples import (
    draw_examples,
    label_examples,
    make_examples,
)
from pipelines.worlds.label_sets import (
    EMOJI_KIND,
    FASHION_FOLDER,
    FASHION_KIND,
    FASHION_LABELS,
    LETTERS_KIND,
    draw_labels,
)
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
