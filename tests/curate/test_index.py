import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Inputs, normalize
from embedcache.cache.cache import Cache
from embedcache.cache.side import open_side
from embedcache.cache.split_settings import SplitSettings
from embedcache.curate import faiss_index
from embedcache.curate.index import build_index, read_card
from embedcache.curate.search import search
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import load_pair, project
from embedcache.sources import open_source
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.evaluate.test_retrieval import train_run
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def run_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(cache_path, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def index_path(cache_path: Path, run_path: Path) -> Path:
    build_index(cache_path, run_path.parent / "index", run_path=run_path)
    return run_path.parent / "index"


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_exact_search_agrees_with_sorting_everything(count: int, k: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = (
        rng.standard_normal((count, 4)).astype(np.float32),
        rng.standard_normal((3, 4)).astype(np.float32),
    )
    rows = np.arange(count) + 7
    cut = [(rows[start : start + block], vectors[start : start + block]) for start in range(0, count, block)]
    expected = -np.sort(-(queries @ vectors.T), axis=1)[:, :k]
    np.testing.assert_allclose(faiss_index.exact_search(queries, cut, k), expected, atol=1e-5)


def test_the_card_says_what_is_in_it_and_how_good_it_is(cache_path: Path, index_path: Path) -> None:
    card = read_card(index_path)
    assert card.feature == "open_toy/cls"
    assert (card.num_vectors, card.width, card.factory) == (300, 16, "Flat")
    assert card.recall_at_10 == 1
    assert card.num_queries == 200
    assert card.run_weights == load_pair(index_path / str(card.run))[1].weights


def test_a_poor_index_is_measured_as_poor(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    card = build_index(cache_path, tmp_path / "pq", run_path=run_path, factory="PQ1x4")
    assert card.recall_at_10 < 0.6


def test_an_index_of_the_same_is_used_again_and_another_is_refused(
    cache_path: Path, run_path: Path, index_path: Path, tmp_path: Path
) -> None:
    before = (index_path / "index.faiss").stat().st_mtime_ns
    assert build_index(cache_path, index_path, run_path=run_path) == read_card(index_path)
    assert (index_path / "index.faiss").stat().st_mtime_ns == before
    with pytest.raises(FingerprintError, match="factory: 'Flat' there, 'HNSW8' asked; give the path of a new folder"):
        build_index(cache_path, index_path, run_path=run_path, factory="HNSW8")


def test_a_folder_with_other_things_is_refused_and_untouched(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PathError, match=r"is not an index and not empty: it holds thesis\.tex"):
        build_index(cache_path, tmp_path, run_path=run_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_search_finds_what_projecting_everything_finds(cache_path: Path, run_path: Path, index_path: Path) -> None:
    cache = Cache(cache_path)
    pair, _ = load_pair(run_path)
    texts = cache.items("text")["text"].to_pylist()
    images = project(pair.image, Inputs(cache.feature("image", "open_toy/cls").load()))
    queries = project(pair.text, Inputs(cache.feature("text", "open_toy/mean").load()[:3]))
    found = search(index_path, texts[:3], k=5)
    for query, hits in zip(queries, found, strict=True):
        scores = images @ query
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=2e-3)  # float16 at rest
        for hit in hits:
            assert hit.key == f"{hit.row:05d}"
            assert hit.captions == [texts[hit.row]]


def test_a_run_on_tokens_is_indexed_and_asked(cache_path: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        model=ModelSettings(projector="token", shared_width=16),
        optimizer=OptimizerSettings(epochs=2, batch_size=64),
        split=SplitSettings(kind="key"),
    )
    train(cache_path, tmp_path / "run", image="open_toy/patches", text="open_toy/tokens", settings=settings)
    assert build_index(cache_path, tmp_path / "index", run_path=tmp_path / "run").num_vectors == 300
    cache = Cache(cache_path)
    pair, _ = load_pair(tmp_path / "run")
    queries = cache.items("text")["text"].to_pylist()[:2]
    rows = np.arange(300)
    images = project(pair.image, open_side(cache, "image", "open_toy/patches").read(rows))
    asked = project(pair.text, open_side(cache, "text", "open_toy/tokens").read(rows[:2]))
    for query, hits in zip(asked, search(tmp_path / "index", queries, k=3), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(images @ query)[::-1][:3], atol=2e-3)


def test_failed_items_are_not_in_an_index(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "s", 30)
    (folder / "00004.png").write_bytes(b"")
    extract(open_source(folder), tmp_path / "c", image=[IMAGE], text=[TEXT], settings=ExtractSettings(chunk_size=8))
    card = build_index(tmp_path / "c", tmp_path / "texts", modality="text")
    assert card.num_vectors == 30
    assert build_index(tmp_path / "c", tmp_path / "index").num_vectors == 29
    vectors = Cache(tmp_path / "c").feature("image").load()
    index = faiss_index.read_index(tmp_path / "index" / "index.faiss")
    for row in (3, 5, 29):
        _, found = faiss_index.search(index, normalize(vectors[row : row + 1]), 1)
        assert found[0, 0] == row
    _, found = faiss_index.search(index, normalize(vectors[:1]), 29)
    assert 4 not in found


def test_an_index_whose_cache_was_made_anew_is_refused(cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "cache")
    build_index(tmp_path / "cache", tmp_path / "index", feature="open_toy/mean", modality="text")
    shutil.rmtree(tmp_path / "cache")
    source = open_source(write_pictures(tmp_path / "s", 30, seed=5))
    extract(source, tmp_path / "cache", text=[TEXT])
    with pytest.raises(FingerprintError, match="made from other samples"):
        search(tmp_path / "index", ["red"])


def test_a_query_is_encoded_by_the_very_encoder_of_the_index(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path / "s", 30))
    extract(source, tmp_path / "c", text=[TEXT])
    build_index(tmp_path / "c", tmp_path / "index", modality="text")
    card = json.loads((tmp_path / "index" / "card.json").read_text())
    card["spec"] = f"{TEXT},scale=2"  # as if the weights behind the name had changed
    (tmp_path / "index" / "card.json").write_text(json.dumps(card))
    with pytest.raises(FingerprintError, match="feature open_toy/mean was made with other settings: weights"):
        search(tmp_path / "index", ["red"])


def test_texts_can_be_indexed_plain(cache_path: Path, tmp_path: Path) -> None:
    card = build_index(cache_path, tmp_path / "index", feature="open_toy/mean", modality="text")
    assert card.run is None
    caption = Cache(cache_path).items("text")["text"][5].as_py()
    (hits,) = search(tmp_path / "index", [caption], k=1)
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert hits[0].captions == [caption]


def test_an_index_of_another_run_is_refused(cache_path: Path, index_path: Path, tmp_path: Path) -> None:
    other = train_run(cache_path, tmp_path / "other", seed=1)
    with pytest.raises(
        FingerprintError, match="the index was made from another run than .*other.*build the index again"
    ):
        search(index_path, ["red"], run_path=other)


def test_a_plain_image_index_takes_no_text(cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", feature="open_toy/cls")
    with pytest.raises(
        DataError, match="plain image feature open_toy/cls, which no text can be compared with.*--projected RUN"
    ):
        search(tmp_path / "index", ["red"])


def test_what_is_moved_together_goes_on_working(cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "here" / "cache")
    run_path = train_run(tmp_path / "here" / "cache", tmp_path / "here" / "run")
    build_index(tmp_path / "here" / "cache", tmp_path / "here" / "index", run_path=run_path)
    before = search(tmp_path / "here" / "index", ["red bar"], k=3)
    (tmp_path / "here").rename(tmp_path / "there")
    assert search(tmp_path / "there" / "index", ["red bar"], k=3) == before
    (tmp_path / "there" / "index").rename(tmp_path / "index")
    with pytest.raises(PathError, match="does not exist"):
        search(tmp_path / "index", ["red bar"])
    moved = {"run_path": tmp_path / "there" / "run", "cache_path": tmp_path / "there" / "cache"}
    assert search(tmp_path / "index", ["red bar"], k=3, **moved) == before  # type: ignore[arg-type]


def test_mistakes_are_named(cache_path: Path, index_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="k is 301; the index holds 300 items"):
        search(index_path, ["red"], k=301)
    with pytest.raises(SettingError, match="no query"):
        search(index_path, [])
    with pytest.raises(DataError, match="a query is empty"):
        search(index_path, ["red", " "])
    with pytest.raises(PathError, match="does not exist; make one with: embedcache curate index"):
        search(tmp_path / "no", ["red"])
    with pytest.raises(SettingError, match="FAISS cannot make an index 'HNS32' of width"):
        build_index(cache_path, tmp_path / "x", feature="open_toy/cls", factory="HNS32")
    with pytest.raises(DataError, match="open_toy/patches has several vectors an item"):
        build_index(cache_path, tmp_path / "x", feature="open_toy/patches")


def test_damaged_indexes_are_named(index_path: Path) -> None:
    copy = index_path.parent / "damaged"
    copy.mkdir()
    for path in index_path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "index.faiss").write_bytes(b"xxxx")
    with pytest.raises(CorruptError, match="is no FAISS index"):
        search(copy, ["red"])
    card = json.loads((copy / "card.json").read_text())
    (copy / "card.json").write_text(json.dumps({**card, "format": 9}))
    with pytest.raises(ValueError, match="has index format 9"):
        search(copy, ["red"])
