"""A filtered search is an exact search among the items that pass."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import normalize
from embedcache.dataset.selections import Selection, write_selection
from embedcache.dataset.splits import read_split, write_split
from embedcache.errors import CorruptError, DataError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.interop.clip_retrieval import open_clip_retrieval
from embedcache.maintain.remove import remove_samples
from embedcache.search.card import may_hold_removed, read_card
from embedcache.search.faiss_index import make_index
from embedcache.search.filters import CacheFilters
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search
from embedcache.search.settings import Filter, IndexSettings, SearchSettings
from embedcache.search.vectors import Vectors
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.interop.cases import import_files, unit_rows, write_tree
from tests.toy import IMAGE, TEXT


@given(
    st.lists(st.booleans(), min_size=2, max_size=60).filter(any),
    st.sampled_from(["Flat", "HNSW8", "IVF2,Flat", "IVF2,SQfp16,RFlat"]),
    st.integers(0, 99),
)
def test_filtered_search_is_exact(kept: list[bool], factory: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = normalize(rng.standard_normal((len(kept), 8)))
    rows = np.sort(rng.permutation(1000)[: len(kept)])
    index = make_index(factory, 8)
    if not index.is_trained:
        index.train(np.repeat(vectors, 40, axis=0))
    index.add(rows, vectors)
    k = min(5, sum(kept))
    effort = {"nprobe": 2, "efSearch": 64, "k_factor": 60}
    scores, found = index.search(vectors[:3], k, effort, is_allowed_N=np.array(kept))
    expected = -np.sort(-(vectors[:3] @ vectors[np.array(kept)].T), axis=1)[:, :k]
    np.testing.assert_allclose(scores, expected, atol=2e-3 if "fp16" in factory else 1e-5)
    assert np.isin(found, rows[np.array(kept)]).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF2,SQ8"])
def test_label_and_part(labeled: Path, tmp_path: Path, factory: str) -> None:
    build_index(labeled, tmp_path / "index", IndexSettings(factory=factory, min_recall=0.0))
    cache, vectors = Cache(labeled), Vectors(labeled, "image")
    keys = np.array(cache.samples["key"].to_pylist())
    queries = Queries(keys=[str(keys[0]), str(keys[40])])
    query_vectors = vectors.read(np.array([0, 40]))
    write_selection(tmp_path / "one.parquet", cache, Selection(rows=np.array([5]), reasons=["x"]), {})
    for keep, prefix in (
        (Filter(selection=tmp_path / "one.parquet"), (str(keys[5]),)),
        (Filter(label_value=("cat",)), ("train/cat", "val/cat")),
        (Filter(part=("val",)), ("val/",)),
        (Filter(label_value=("dog", "cat"), part=("train",)), ("train/",)),
        (Filter(label_value=("dog",), part=("val",)), ("val/dog",)),
    ):
        rows = np.flatnonzero([str(key).startswith(prefix) for key in keys])
        assert np.flatnonzero(CacheFilters(cache, "image").mask(keep)).tolist() == rows.tolist()
        expected = -np.sort(-(query_vectors @ vectors.read(rows).T), axis=1)[:, :7]
        for hits, scores in zip(
            search(tmp_path / "index", queries, SearchSettings(k=min(7, len(rows)), filter=keep)), expected, strict=True
        ):
            np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-5)
            assert all(hit.key.startswith(prefix) for hit in hits)
            assert all(hit.label == hit.key.split("/")[1] for hit in hits)


def test_selection(labeled: Path, labeled_index: Path, tmp_path: Path) -> None:
    cache = Cache(labeled)
    selection = Selection(rows=np.array([3, 20, 44]), reasons=["x"] * 3)
    write_selection(tmp_path / "s.parquet", cache, selection, {})
    key = cache.samples["key"][0].as_py()
    (hits,) = search(
        labeled_index, Queries(keys=[key]), SearchSettings(filter=Filter(selection=tmp_path / "s.parquet"))
    )
    assert sorted(hit.row for hit in hits) == [3, 20, 44]


def test_part_of_run_split(cache_path: Path, run_path: Path, index_path: Path, tmp_path: Path) -> None:
    cache = Cache(cache_path)
    rows = read_split(run_path / "split.parquet", [cache]).rows("test")
    filters = CacheFilters(cache, "image", run_path)
    assert np.flatnonzero(filters.mask(Filter(part=("test",)))).tolist() == rows.tolist()
    assert filters.values("split")["test"] == len(rows)
    (hits,) = search(index_path, ["red bar"], SearchSettings(k=len(rows), filter=Filter(part=("test",))))
    assert sorted(hit.row for hit in hits) == rows.tolist()
    with pytest.raises(UnknownNameError, match="unknown part 'tset' in .*; did you mean 'test'"):
        filters.mask(Filter(part=("tset",)))
    damaged = Path(shutil.copytree(run_path, tmp_path / "run"))
    split = read_split(run_path / "split.parquet", [cache])
    write_split(damaged / "split.parquet", replace(split, parts=["test"] * len(split.keys)))
    with pytest.raises(CorruptError, match=r"expected the split that config.json was written for, got another file"):
        CacheFilters(cache, "image", damaged).mask(Filter(part=("test",)))


def test_language(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 12)
    for path in sorted((tmp_path / "photos").glob("*.txt"))[:4]:
        path.with_suffix(".json").write_text(json.dumps({"caption": f"rot {path.stem}", "language": "de"}))
    extract(open_source(tmp_path / "photos"), tmp_path / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    for modality in ("image", "text"):
        build_index(tmp_path / "cache", tmp_path / modality, IndexSettings(modality=modality))
    ask = Queries(keys=["00000"])
    (hits,) = search(tmp_path / "image", ask, SearchSettings(filter=Filter(language=("de",))))
    assert sorted(hit.row for hit in hits) == [0, 1, 2, 3]
    assert all(list(hit.captions) == [f"rot {hit.key}"] for hit in hits)
    (hits,) = search(tmp_path / "text", ask, SearchSettings(filter=Filter(language=("de",))))
    assert sorted(hit.captions[0] for hit in hits) == [f"rot 0000{number}" for number in range(4)]
    assert CacheFilters(Cache(tmp_path / "cache"), "image").values("language") == {"de": 4}
    (hits,) = search(tmp_path / "image", ask)  # captions of other languages are folded
    assert hits[0].languages == ["de", None]
    assert hits[0].captions == ["rot 00000"]
    assert all(hit.languages == [None] and len(hit.captions) == 1 for hit in hits if hit.row > 3)
    with pytest.raises(UnknownNameError, match="unknown language 'fr' in .*; known: de"):
        search(tmp_path / "image", ask, SearchSettings(filter=Filter(language=("fr",))))


def test_language_of_captions_without_one_raises(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 3)
    extract(open_source(tmp_path / "photos"), tmp_path / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings())
    with pytest.raises(UnknownNameError) as error:
        search(tmp_path / "index", Queries(keys=["00000"]), SearchSettings(filter=Filter(language=("en",))))
    said = f"--language: {tmp_path / 'cache'} names no language, expected 'en'; search without --language"
    assert str(error.value) == said  # the index holds the path as ../cache


def test_invalid_filters_raise(labeled: Path, labeled_index: Path, cache_path: Path, tmp_path: Path) -> None:
    ask = Queries(keys=[Cache(labeled).samples["key"][0].as_py()])
    with pytest.raises(UnknownNameError, match=r"unknown label 'cta' in .*; did you mean 'cat'\?; known: cat, dog"):
        search(labeled_index, ask, SearchSettings(filter=Filter(label_value=("cta",))))
    with pytest.raises(SettingError, match="from 1 to 15, as 15 of 60 items pass the filter, got 16"):
        search(labeled_index, ask, SearchSettings(k=16, filter=Filter(label_value=("cat",), part=("val",))))
    (tmp_path / "s.txt").write_text(ask.keys[0] + "\n")
    with pytest.raises(DataError, match="filter: expected items that pass, got none of the 60"):
        search(labeled_index, ask, SearchSettings(filter=Filter(part=("val",), selection=tmp_path / "s.txt")))
    with pytest.raises(UnknownNameError, match="--label-value: expected a column 'label' in .*, got the columns"):
        CacheFilters(Cache(cache_path), "image").mask(Filter(label_value=("cat",)))
    assert CacheFilters(Cache(cache_path), "image").values("label") == {}


def test_labels_are_in_the_named_column(labeled: Path, labeled_index: Path) -> None:
    ask = Queries(keys=[Cache(labeled).samples["key"][0].as_py()])
    condition = Filter(label_value=("train/dog",))
    (hits,) = search(labeled_index, ask, SearchSettings(k=15, label="folder", filter=condition))
    assert {(hit.label, hit.key.rpartition("/")[0]) for hit in hits} == {("train/dog", "train/dog")}
    filters = CacheFilters(Cache(labeled), "image", label="folder")
    assert filters.values("label") == {f"{part}/{name}": 15 for part in ("train", "val") for name in ("cat", "dog")}
    with pytest.raises(UnknownNameError, match=r"unknown column of samples 'fodler' .*; did you mean 'folder'\?"):
        search(labeled_index, ask, SearchSettings(label="fodler"))


def test_values_are_counted_with_those_that_no_item_has(captioned: Path, labeled: Path) -> None:
    images, texts = (CacheFilters(Cache(captioned), modality) for modality in ("image", "text"))
    assert list(images.values("label").items()) == [("cat", 3), ("dog", 2)]
    assert list(texts.values("label").items()) == [("cat", 8), ("dog", 0)]
    assert (images.values("language"), texts.values("language")) == ({"de": 1}, {"de": 2})
    assert CacheFilters(Cache(labeled), "image").values("split") == {"train": 30, "val": 30}


def test_missing_columns_and_captions_are_named(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    cache, _ = import_files(open_clip_retrieval(write_tree(tmp_path / "tree", unit_rows(3))), tmp_path / "cache")
    for filters in (
        CacheFilters(cache, "image"),
        CacheFilters(cache, "image", tmp_path),
    ):  # no run, one without a split
        assert [filters.values(name) for name in ("label", "split", "language")] == [{}, {}, {}]
        for condition, message in (
            (Filter(label_value=("cat",)), "--label-value: expected a column 'label' in .*, got the columns key"),
            (Filter(part=("val",)), "--part: expected a column 'split' in .*, got the columns key"),
            (Filter(language=("de",)), "--language: expected captions in .*, got none"),
        ):
            with pytest.raises(UnknownNameError, match=message):
                filters.mask(condition)
    filters = CacheFilters(Cache(cache_path), "image", run_path)
    assert filters.values("label") == {}
    assert sum(filters.values("split").values()) == 300
    with pytest.raises(UnknownNameError, match="--label-value: expected a column 'label'"):
        filters.mask(Filter(label_value=("cat",)))


def test_a_fraction_of_the_items_is_searched_more_thoroughly(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the search of more items than are compared one by one: a quarter passes, so 4 times as many lists."""
    settings = IndexSettings(feature="open_toy/cls", factory="IVF8,SQ8", min_recall=0.0)
    build_index(labeled, tmp_path / "index", settings)
    index = OpenIndex(tmp_path / "index")
    index.card = replace(index.card, search={"nprobe": 2, "k_factor": 4})
    searches: list[dict[str, int]] = []
    inner = index._index.search
    monkeypatch.setattr(
        index._index, "search", lambda *given, **options: [searches.append(dict(given[2])), inner(*given, **options)][1]
    )
    queries_QP = index.query_encoder.indexed.read(np.array([0, 16]))
    condition = Filter(label_value=("cat",), part=("train",))
    (few, _) = index.search_vectors(queries_QP, k=3, condition=condition)
    assert not searches
    monkeypatch.setattr("embedcache.search.search._COMPARE_ALL", 14)
    index._subset.cache_clear()
    (hits, _) = index.search_vectors(queries_QP, k=3, condition=condition)
    assert searches == [{"nprobe": 8, "k_factor": 4}]
    assert hits[0].row == few[0].row == 0
    searches.clear()
    assert len(index.search_vectors(queries_QP, k=60)[0]) == 60  # not all are in two lists
    assert searches == [{"nprobe": 2, "k_factor": 4}, {"nprobe": 8, "k_factor": 4, "efSearch": 60}]


@pytest.mark.parametrize("factory", ["PQ4x4", "PCA16,PQ4x4", "PQ4x4fs", "IVF2,RQ2x4"])
def test_kinds_that_faiss_cannot_filter_are_filtered(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    build_index(labeled, tmp_path / "index", feature="open_toy/cls", factory=factory, min_recall=0.0)
    monkeypatch.setattr("embedcache.search.search._COMPARE_ALL", 0)
    index = OpenIndex(tmp_path / "index")
    queries_QP = index.query_encoder.indexed.read(np.array([0, 16]))
    ranked = index.search_vectors(queries_QP, k=60)
    for hits, every in zip(index.search_vectors(queries_QP, k=7, condition=Filter(part=("val",))), ranked, strict=True):
        assert all(hit.key.startswith("val/") for hit in hits)
        assert [hit.score for hit in hits] == [hit.score for hit in every if hit.key.startswith("val/")][:7]


def test_vectors_are_read_only_of_few_items_of_an_index_of_codes(
    labeled: Path, labeled_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = IndexSettings(feature="open_toy/cls", factory="SQ8", min_recall=0.0)
    build_index(labeled, tmp_path / "index", settings)
    (tmp_path / "one.txt").write_text("val/cat/00003\n")
    none, some = Filter(part=("train",), selection=tmp_path / "one.txt"), Filter(part=("val",))
    for path, is_read in ((labeled_index, False), (tmp_path / "index", True)):
        index = OpenIndex(path)
        assert (index.count(none), index.count(Filter()), index.count(Filter(label_value=("cat", "dog")))) == (
            0,
            60,
            60,
        )
        assert "indexed" not in vars(index.query_encoder)
        assert index.count(some) == 30
        assert ("indexed" in vars(index.query_encoder)) is is_read


def test_last_eight_filters_are_kept(labeled_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = OpenIndex(labeled_index)
    asked: list[Filter] = []
    mask = index.filters.mask
    monkeypatch.setattr(index.filters, "mask", lambda condition: [asked.append(condition), mask(condition)][1])
    labels, parts = (("cat",), ("dog",), ("cat", "dog")), (("train",), ("val",), ("val", "train"))
    nine = [Filter(label_value=label, part=part) for label in labels for part in parts]
    for condition in (*nine[:8], *nine[:8], nine[8], nine[0]):
        index.count(condition)
    assert asked == [*nine, nine[0]]


def test_samples_removed_since_are_not_found(labeled: Path, labeled_index: Path, tmp_path: Path) -> None:
    cache, key = Path(shutil.copytree(labeled, tmp_path / "cache")), "train/cat/00003"
    card = read_card(labeled_index)
    assert not may_hold_removed(card, Cache(cache))
    assert not may_hold_removed(replace(card, index_digest="other"), Cache(cache))  # grown, but nothing was removed
    remove_samples(cache, [key])
    assert may_hold_removed(card, Cache(cache))
    assert not may_hold_removed(replace(card, index_digest=Cache(cache).info.index_digest), Cache(cache))
    index = OpenIndex(labeled_index, cache=cache)
    (hits,) = index.search(Queries(keys=["train/cat/00004"]), k=59)
    assert key not in {hit.key for hit in hits}
    assert (len(hits), index.count(Filter()), index.count(Filter(label_value=("cat",)))) == (59, 59, 29)
    with pytest.raises(SettingError, match="from 1 to 59, as 59 of 60 items pass the filter, got 60"):
        index.search(Queries(keys=["train/cat/00004"]), k=60)


def test_vectors_of_another_shape_or_without_values_raise(labeled_index: Path) -> None:
    index = OpenIndex(labeled_index)
    queries_QP = index.query_encoder.indexed.read(np.array([0, 16]))
    for vectors in (queries_QP[0], queries_QP[:, 1:]):
        with pytest.raises(DataError, match=rf"expected \(Q, {queries_QP.shape[1]}\) vectors for .*, got \("):
            index.search_vectors(vectors)
    queries_QP[1, 2] = np.nan
    with pytest.raises(DataError, match="expected finite vectors for"):
        index.search_vectors(queries_QP)
