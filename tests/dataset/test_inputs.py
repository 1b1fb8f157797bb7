"""Inputs and pairs of items of samples."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Inputs
from embedcache.dataset.inputs import (
    InputFeature,
    check_same_view,
    choose_pair,
    features_by_modality,
    open_input,
    to_inputs,
    to_mean_vectors,
    view_feature,
)
from embedcache.dataset.pairs import Items, Pairs, choose_language, pair_items
from embedcache.errors import DataError, FingerprintError, SettingError, UnfinishedError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from tests.images import write_images
from tests.store.features import random_items, write_feature
from tests.toy import IMAGE, TEXT


def test_ragged_feature_comes_last() -> None:
    tokens = [np.ones((2, 3)), np.ones((4, 3))]
    assert to_inputs([[np.zeros(3)] * 2, tokens]).lengths.tolist() == [3, 5]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="must come last"):
        to_inputs([tokens, [np.zeros(3)] * 2])


@pytest.mark.parametrize("chunk_bytes", [24, 48])
def test_dense_items_are_read_without_an_object_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """Check chunks of four items of 12 bytes in one file and in two."""
    monkeypatch.setattr("embedcache.store.layout._TOKEN_CHUNK_BYTES", chunk_bytes)
    items = random_items(8, (2, 3), seed=1, failed=[2])
    feature = InputFeature([write_feature(tmp_path, items, (2, 3), chunk_size=4)])
    monkeypatch.setattr(Feature, "items", lambda *_: pytest.fail("items are read one by one"))
    (first, one), (second, other) = feature.blocks()
    assert (first.tolist(), second.tolist()) == ([0, 1, 3], [4, 5, 6, 7])
    for rows, inputs in ((first, one), (second, other)):
        assert inputs.values.tolist() == [items[row].astype(np.float16).tolist() for row in rows]  # type: ignore[union-attr]


SHAPES = {"vectors": (3,), "fixed": (2, 3), "varying": (-1, 3)}


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.lists(st.sampled_from(["vectors", "fixed"]), max_size=2),
    st.sampled_from(list(SHAPES)),
    st.integers(1, 4),
    st.integers(0, 999),
)
def test_reading_any_way_gives_the_same_items(before: list[str], last: str, chunk_size: int, seed: int) -> None:
    """Check rows, chunks, blocks and all items in memory against the items that were written, one by one."""
    names, count, rng = [*before, last], 9, np.random.default_rng(seed)
    failed = [rng.choice(count, 2, replace=False).tolist() for _ in names]
    written = [random_items(count, SHAPES[n], seed=seed + k, failed=failed[k]) for k, n in enumerate(names)]
    with tempfile.TemporaryDirectory() as folder:
        features = [
            write_feature(
                Path(folder) / str(k), written[k], SHAPES[name], chunk_size=chunk_size, skip_chunks=[1] * (k == 0)
            )
            for k, name in enumerate(names)
        ]
        feature = InputFeature(features)
        expected: dict[int, np.ndarray] = {}
        for row in range(count):
            items = [part[row] for part in written]
            if row // chunk_size != 1 and all(item is not None for item in items):
                rows = [np.atleast_2d(item.astype(np.float16)) for item in items]  # type: ignore[union-attr]
                expected[row] = np.concatenate(rows)
        assert np.flatnonzero(feature.valid).tolist() == list(expected)

        def check(rows: list[int], inputs: Inputs) -> None:
            assert inputs.values.ndim == (2 if names == ["vectors"] else 3)
            values = inputs.values[:, None] if inputs.values.ndim == 2 else inputs.values
            lengths = [values.shape[1]] * len(rows) if inputs.lengths is None else inputs.lengths.tolist()
            assert [values[place, :length].tolist() for place, length in enumerate(lengths)] == [
                expected[row].tolist() for row in rows
            ]
            assert all((values[place, length:] == 0).all() for place, length in enumerate(lengths))

        found = []
        for block, inputs in feature.blocks():
            check(block.tolist(), inputs)
            found += block.tolist()
        assert found == list(expected)
        with pytest.raises(UnfinishedError):
            feature.require_complete()
        if rows := [*expected][::-1]:
            check(rows, feature.read(np.array(rows)))


@pytest.mark.parametrize("name", list(SHAPES))
def test_all_items_in_memory_are_read_by_row(tmp_path: Path, name: str) -> None:
    items = random_items(9, SHAPES[name], seed=3, failed=[4])
    feature = InputFeature([write_feature(tmp_path, items, SHAPES[name], chunk_size=4)])
    feature.require_complete()
    rows = np.array([8, 0, 3, 7, 7])
    loaded, read = feature.load()(rows), feature.read(rows)
    np.testing.assert_array_equal(loaded.values, read.values)
    if name == "varying":
        counts = [0 if item is None else len(item) for item in items]
        assert feature.lengths().tolist() == counts
        np.testing.assert_array_equal(loaded.lengths, read.lengths)
        assert loaded.lengths.tolist() == [counts[row] for row in rows]  # type: ignore[union-attr]
        assert feature.item_shape == (round(sum(counts) / 9), 3)
        assert feature.num_bytes == sum(counts) * 3 * 2
    else:
        assert loaded.lengths is None
        assert feature.item_shape == SHAPES[name]
        assert feature.num_bytes == 9 * np.prod(SHAPES[name]) * 2
        assert feature.lengths().tolist() == [0 if row == 4 else 2 if name == "fixed" else 1 for row in range(9)]
    assert feature.has_tokens == (name != "vectors")
    assert feature.dtype == np.float16


def test_joined_features_have_the_sum_of_their_tokens(cache_path: Path) -> None:
    cache = Cache(cache_path)
    joined = open_input(cache, "text", "open_toy/mean+open_toy/tokens")
    mean, tokens = open_input(cache, "text", "open_toy/mean"), open_input(cache, "text", "open_toy/tokens")
    assert joined.lengths().tolist() == (1 + tokens.lengths()).tolist()
    assert joined.item_shape == (round(1 + tokens.lengths().mean()), 32)
    assert joined.num_bytes == mean.num_bytes + tokens.num_bytes
    assert joined.name == "open_toy/mean+open_toy/tokens"
    rows = np.array([5, 2])
    hashes = joined.hashes_of(rows).to_pylist()
    assert hashes == [tokens.hashes[5], tokens.hashes[2]]


def test_views_are_compared_without_their_name() -> None:
    assert view_feature("a/cls+a/patches", "plain") == "a/cls+a/patches"
    assert view_feature("a/cls", "flip") == "a@flip/cls"
    one, flipped = {"family": "a"}, {"family": "a", "view": "flip"}
    check_same_view("w", one, flipped, "flip", next_step="n")
    check_same_view("w", one, one, "plain", next_step="n")
    for expected, found, view in ((one, flipped, "plain"), (one, {**flipped, "family": "b"}, "flip")):
        with pytest.raises(FingerprintError):
            check_same_view("w", expected, found, view, next_step="n")


def test_mean_vectors_leave_padding_out() -> None:
    values = np.array([[[2, 4], [4, 8]], [[1, 3], [0, 0]]], np.float16)
    assert to_mean_vectors(Inputs(values, np.array([2, 1]))).tolist() == [[3, 6], [1, 3]]
    assert to_mean_vectors(Inputs(values)).tolist() == [[3, 6], [0.5, 1.5]]
    assert to_mean_vectors(Inputs(values[:, :1])).tolist() == values[:, 0].tolist()
    assert to_mean_vectors(Inputs(values[0])).tolist() == values[0].tolist()
    assert to_mean_vectors(Inputs(values[0])).dtype == np.float32


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("named")
    source = open_source(write_images(folder / "photos", 4))
    settings = ExtractSettings(features=("cls", "patches", "mean", "tokens"))
    extract(source, folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return Cache(folder / "cache")


def test_a_name_of_one_modality_needs_no_modality(cache: Cache) -> None:
    by_modality = {"image": ["open_toy/cls"], "text": ["open_toy/mean"]}
    for feature in (
        by_modality,
        {"image": "open_toy/cls", "text": "open_toy/mean"},
        ["open_toy/mean", "open_toy/cls"],
        ["text=open_toy/mean", "image=open_toy/cls"],
    ):
        assert features_by_modality(cache, feature) == by_modality
    assert features_by_modality(cache, "open_toy/cls+open_toy/patches") == {"image": ["open_toy/cls+open_toy/patches"]}


def test_a_pair_is_completed(cache: Cache) -> None:
    assert choose_pair(cache, None) == {"image": None, "text": None}
    assert choose_pair(cache, "open_toy/mean") == {"image": None, "text": "open_toy/mean"}
    several = {"image": ["open_toy/cls", "open_toy/patches"], "text": None}
    assert choose_pair(cache, several) == {"image": "open_toy/cls+open_toy/patches", "text": None}


def test_wrong_names_raise(cache: Cache) -> None:
    with pytest.raises(UnknownNameError, match="known: open_toy/cls"):
        features_by_modality(cache, "open_toy/clz")
    with pytest.raises(SettingError, match="images and texts"):
        features_by_modality(cache, "open_toy")
    with pytest.raises(SettingError, match="two modalities"):
        choose_pair(cache, {"audio": "a"})


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
