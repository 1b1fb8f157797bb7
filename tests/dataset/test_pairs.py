import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.dataset.inputs import open_input
from embedcache.dataset.pairs import Items, Pairs, choose_language, pair_items
from embedcache.errors import DataError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.toy import IMAGE, TEXT


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    """Samples with one or more images and texts, whose contents often repeat."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    count = draw(st.integers(1, 6))

    def side() -> Items:
        samples = np.sort(np.concatenate([np.arange(count), rng.integers(count, size=draw(st.integers(0, 5)))]))
        contents = rng.integers(5, size=len(samples))
        return Items(rows=np.arange(len(samples)), samples=samples, contents=contents)

    return Pairs(first=side(), second=side())


@given(pairs())
def test_positives_by_equal_content(pairs: Pairs) -> None:
    together = {
        (image, text)
        for image, image_sample in zip(pairs.first.contents, pairs.first.samples, strict=True)
        for text, text_sample in zip(pairs.second.contents, pairs.second.samples, strict=True)
        if image_sample == text_sample
    }
    expected = [
        (i, t)
        for i, image in enumerate(pairs.first.contents)
        for t, text in enumerate(pairs.second.contents)
        if (image, text) in together
    ]
    assert list(zip(*(array.tolist() for array in pairs.positives()), strict=True)) == expected


@given(pairs())
def test_joined_pairs_all_items_of_a_sample(pairs: Pairs) -> None:
    expected = [
        (i, t)
        for i, image in enumerate(pairs.first.samples)
        for t, text in enumerate(pairs.second.samples)
        if image == text
    ]
    assert list(zip(*(array.tolist() for array in pairs.all_pairs()), strict=True)) == expected


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Six images, of which the third is damaged, with captions in three languages, the last ones equal."""
    folder = tmp_path_factory.mktemp("captioned")
    write_images(folder, 6)
    (folder / "00002.png").write_text("no image")
    captions = [["one", "two"], ["eins", "zwei"], ["un"], [], ["drei"], ["drei"]]
    rows = [
        {"key": f"k{row}", "image": f"{row:05d}.png", "caption": caption, "language": language}
        for row, (caption, language) in enumerate(zip(captions, ["en", "de", "fr", "de", "de", None], strict=True))
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extract(open_source(folder / "t.jsonl"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    return Cache(folder / "cache")


def paired(*caches: Cache, language: str | None = None) -> Pairs:
    images, texts = ([open_input(cache, m) for cache in caches] for m in ("image", "text"))
    return pair_items(caches, images, texts, language=language)


def test_items_of_samples_with_both_features_are_paired(captioned: Cache) -> None:
    for language in (None, "any"):
        pairs = paired(captioned, language=language)
        assert pairs.samples.tolist() == pairs.first.samples.tolist() == pairs.first.rows.tolist() == [0, 1, 4, 5]
        assert pairs.second.rows.tolist() == [0, 1, 2, 3, 5, 6]
        assert pairs.second.samples.tolist() == [0, 0, 1, 1, 4, 5]
        assert len(set(pairs.second.contents[:5].tolist())) == 5
        assert pairs.second.contents[4] == pairs.second.contents[5]


def test_captions_of_a_language_are_counted_across_caches(captioned: Cache) -> None:
    german = paired(captioned, captioned, language="de")
    assert german.samples.tolist() == german.first.rows.tolist() == [1, 4, 7, 10]
    assert german.second.rows.tolist() == [2, 3, 5, 9, 10, 12]
    assert german.second.samples.tolist() == [1, 1, 4, 7, 7, 10]
    assert german.second.contents[:3].tolist() == german.second.contents[3:].tolist()


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([("a", "en"), ("a", "de"), ("b", "de"), ("b", "en"), ("b", "en")], "en"),
        ([("a", "en"), ("a", "de"), ("b", "de")], None),
        ([("a", "en"), ("b", "en")], None),
        ([("a", None), ("a", "de"), ("b", None)], None),
        ([("a", "de"), ("a", None), ("b", "de")], "de"),
        ([("a", None)], None),
    ],
)
def test_language_that_all_samples_share(tmp_path: Path, captions: list[tuple[str, str]], expected: str | None) -> None:
    rows = [{"key": key, "caption": f"{key} {language}", "language": language} for key, language in captions]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path / "t.jsonl", settings=SourceSettings(key_column="key"))
    extract(source, tmp_path / "cache", text_encoder=[TEXT])
    cache = Cache(tmp_path / "cache")
    for caches in ([cache], [cache, cache]):
        assert choose_language(caches, ["image", "text"], None) == expected
        assert choose_language(caches, ["image", "text"], "any") == "any"


def test_captions_that_cannot_be_paired_raise(captioned: Cache, two_caches: list[Path]) -> None:
    caches = [Cache(path) for path in two_caches]
    images = [open_input(cache, "image", "open_toy/cls") for cache in caches]
    texts = [open_input(cache, "text", "open_toy/mean") for cache in caches]
    calls: list[tuple[Callable[[], Pairs], type[Exception], str]] = [
        (lambda: paired(captioned, language="fr"), DataError, "none"),
        (lambda: paired(captioned, language="dee"), UnknownNameError, "dee"),
        (lambda: pair_items(caches[:1], images[:1], texts[1:]), DataError, "80"),
        (lambda: pair_items(caches, images, texts, language="de"), UnknownNameError, "no language"),
    ]
    for call, error, word in calls:
        with pytest.raises(error, match=word):
            call()
