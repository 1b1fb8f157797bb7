from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pytest

from embedcache.errors import ItemError
from embedcache.sources import FileItem, Sample, Source, SourceSettings, open_source
from embedcache.testing.sources import SourceContract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def all_languages() -> Source:
    return open_source("openmoji:")


class FirstImages:
    """The first six images of OpenMoji, as drawing all of them takes seconds."""

    def __init__(self, location: str, settings: SourceSettings) -> None:
        self._source = open_source(f"openmoji:{location}", settings=settings)
        self.read = self._source.read

    def describe(self) -> Mapping[str, Any]:
        return {**self._source.describe(), "type": f"{__name__}:FirstImages"}

    def samples(self) -> Iterator[Sample]:
        return islice(self._source.samples(), 6)


class TestOpenmoji(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls) -> Source:
        return FirstImages("en+de", SourceSettings())


def test_images_are_unique(all_languages: Source) -> None:
    """Check flags and people, where identical images occur."""
    by_emoji = {sample.columns["emoji"]: sample for sample in all_languages.samples()}
    several = [sample for emoji, sample in by_emoji.items() if len(str(emoji)) > 1]  # characters
    images = [all_languages.read(sample.images[0]) for sample in (*several[:190], *several[425:520])]
    assert len(set(images)) == len(images)


def test_second_source_draws_nothing_again(all_languages: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [sample.key for sample in all_languages.samples()]
    monkeypatch.setattr("embedcache.quickstart.openmoji._EmojiFont", None)
    other = open_source("openmoji:en")
    assert [sample.key for sample in other.samples()] == names
    assert other.read(FileItem(path="1F600")) == all_languages.read(FileItem(path="1F600"))


def test_only_given_languages_are_kept() -> None:
    source = open_source("openmoji:de+fr")
    assert {text.language for text in next(source.samples()).texts} == {"de", "fr"}
    by_setting = open_source("openmoji:", settings=SourceSettings(languages=("de", "fr")))
    assert by_setting.describe() == source.describe()


@pytest.mark.parametrize("path", ["xyz", "110000", "E000-E001", ""])
def test_invalid_key_raises_item_error(all_languages: Source, path: str) -> None:
    with pytest.raises(ItemError):
        all_languages.read(FileItem(path=path))


def test_label_is_the_unicode_group(all_languages: Source) -> None:
    labels = {sample.columns["emoji"]: sample.columns["label"] for sample in all_languages.samples()}
    assert (labels["🐱"], labels["❤️"], labels["🇨🇭"]) == ("Animals & Nature", "Smileys & Emotion", "Flags")
    assert len(set(labels.values()) - {None}) == 9
    assert sum(label is None for label in labels.values()) < 50
