import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embedcache.arrays import Array, Inputs, normalize
from embedcache.dataset.inputs import open_input
from embedcache.dataset.selections import Selection, write_selection
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split, write_split
from embedcache.dataset.vectors import Vectors
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import (
    CorruptError,
    DataError,
    EmbedcacheError,
    FingerprintError,
    PathError,
    SettingError,
    UnknownNameError,
)
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.inference import load
from embedcache.maintain.remove import remove_samples
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.search.faiss_index import make_index, may_hold_removed, read_card
from embedcache.search.index import build_index
from embedcache.search.queries import Queries, read_vectors
from embedcache.search.search import CacheFilters, HitReader, OpenIndex, search
from embedcache.search.settings import Filter, IndexSettings, SearchSettings
from embedcache.settings import replace_fields
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from embedcache.vectors.opening import open_vectors
from tests.edits import edit_record
from tests.evaluate.test_retrieval import train_run
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT, ToyTexts
from tests.vectors.cases import import_files, unit_rows, write_tree


def test_search_equals_brute_force(cache_path: Path, run_path: Path, index_path: Path) -> None:
    cache = Cache(cache_path)
    pair = Run.open(run_path).pair
    texts = cache.items("text")["text"].to_pylist()
    images = project(pair.tower("image"), Inputs(cache.feature("image", "open_toy/cls").load()))
    queries = project(pair.tower("text"), Inputs(cache.feature("text", "open_toy/mean").load()[:3]))
    found = search(index_path, texts[:3], SearchSettings(k=5))
    for query, hits in zip(queries, found, strict=True):
        scores = images @ query
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=2e-3)  # float16 at rest
        for hit in hits:
            assert hit.key == f"{hit.row:05d}"
            assert hit.captions == [texts[hit.row]]


def test_many_queries_are_counted(index_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, progress = Queries(keys=["00007", "00003", "00007"]), RecordedProgress()
    expected = search(index_path, queries, SearchSettings(k=3), progress=progress)
    assert not progress.started
    monkeypatch.setattr("embedcache.search.search._BATCH", 2)
    assert search(index_path, queries, SearchSettings(k=3), progress=progress) == expected
    assert search(index_path, queries, SearchSettings(k=3), progress=False) == expected
    assert (progress.started, progress.advances) == ([("searching", 3, "queries")], [2, 1])
    assert progress.finished == ["searching"]


def test_search_reads_the_rows_it_shows(index_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = search(index_path, Queries(keys=["00007"]), SearchSettings(k=3))
    read = Cache.table  # of all rows, unless some are named
    monkeypatch.setattr(Cache, "table", lambda *table, rows, **columns: read(*table, rows=rows, **columns))
    (hits,) = search(index_path, Queries(keys=["00007"]), SearchSettings(k=3))
    assert [hits] == expected
    assert all(hit.captions for hit in hits)


@pytest.mark.slow
def test_search_of_an_exact_index_by_key_imports_no_torch(labeled_index: Path, index_path: Path) -> None:
    program = (
        "import sys\n"
        "from embedcache.search.search import Queries, search\n"
        f"print(search({str(labeled_index)!r}, Queries(keys=['train/cat/00003']), k=1)[0][0].key)\n"
        f"print(search({str(index_path)!r}, Queries(keys=['00007']), k=1)[0][0].key)\n"  # of a run
        "print({'torch', 'zarr', 'scipy.sparse', 'timm', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "train/cat/00003\n00007\nset()\n"


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,SQfp16"])
def test_vector_of_a_key_is_that_of_the_feature(cache_path: Path, run_path: Path, tmp_path: Path, factory: str) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path, factory=factory, min_recall=0.0))
    index = OpenIndex(tmp_path / "index")
    rows = np.array([7, 299, 7, 0])
    found = index.query_encoder.encode(Queries(keys=[f"{row:05d}" for row in rows]))
    np.testing.assert_allclose(found, index.query_encoder.indexed.read(rows), atol=1e-6)
    assert (index._index.read(rows) is not None) == (factory in ("Flat", "HNSW8"))
    assert index._index.read(np.array([7, 300])) is None


@pytest.mark.slow
def test_search_with_token_run(cache_path: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        model=ModelSettings(projector="token", shared_width=16),
        optimizer=OptimizerSettings(epochs=2, batch_size=64),
        split=SplitSettings(kind="key"),
    )
    train(
        cache_path,
        tmp_path / "run",
        feature={"image": "open_toy/patches", "text": "open_toy/tokens"},
        settings=settings,
    )
    assert build_index(cache_path, tmp_path / "index", IndexSettings(run=tmp_path / "run")).num_vectors == 300
    cache = Cache(cache_path)
    pair = Run.open(tmp_path / "run").pair
    queries = cache.items("text")["text"].to_pylist()[:2]
    rows = np.arange(300)
    images = project(pair.tower("image"), open_input(cache, "image", "open_toy/patches").read(rows))
    vectors = project(pair.tower("text"), open_input(cache, "text", "open_toy/tokens").read(rows[:2]))
    for query, hits in zip(vectors, search(tmp_path / "index", queries, SearchSettings(k=3)), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(images @ query)[::-1][:3], atol=2e-3)


@pytest.mark.slow
def test_search_on_other_samples_raises(cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "cache")
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(feature="open_toy/mean", modality="text"))
    shutil.rmtree(tmp_path / "cache")
    source = open_source(write_images(tmp_path / "s", 30, seed=5))
    extract(source, tmp_path / "cache", text_encoder=[TEXT])
    with pytest.raises(FingerprintError, match="samples"):
        search(tmp_path / "index", ["red"])


def test_search_with_changed_encoder_raises(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "s", 30))
    extract(source, tmp_path / "c", text_encoder=[TEXT])
    build_index(tmp_path / "c", tmp_path / "index", IndexSettings(modality="text"))
    edit_record(tmp_path / "index" / "card.json", spec=f"{TEXT},scale=2")  # as if the weights had changed
    with pytest.raises(FingerprintError, match="weights"):
        search(tmp_path / "index", ["red"])


class WholeTexts(ToyTexts):
    """An encoder of texts for which the spaces around one matter."""

    def prepare(self, items: Sequence[str]) -> list[Array]:
        return super().prepare([re.sub(r"\s", "_", text) for text in items])


def open_whole_texts(spec: EncoderSpec, **_: object) -> WholeTexts:
    return WholeTexts(1, 0)


@pytest.mark.slow
def test_spaces_around_a_text_change_nothing(image_folder: Path, tmp_path: Path) -> None:
    """They are no part of captions, either."""
    cache, run, index = (tmp_path / name for name in ("cache", "run", "index"))
    spec = "tests.search.test_search:open_whole_texts"
    extract(open_source(image_folder), cache, image_encoder=[IMAGE], text_encoder=[spec], limit=30)
    caption = Cache(cache).items("text")["text"][5].as_py()
    build_index(cache, index, IndexSettings(modality="text"))
    (hits,) = search(index, [f"  {caption}\n"], SearchSettings(k=1))
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    train(cache, run, split="key", epochs=0, projector="linear", shared_width=4)
    model = load(run)
    np.testing.assert_array_equal(model.encode_text(f"  {caption}\n"), model.encode_text(caption))


def test_search_with_other_run_raises(cache_path: Path, index_path: Path, tmp_path: Path) -> None:
    other = train_run(cache_path, tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match="weights"):
        search(index_path, ["red"], SearchSettings(run=other))


@pytest.mark.slow
def test_search_after_move(cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "here" / "cache")
    run_path = train_run(tmp_path / "here" / "cache", tmp_path / "here" / "run")
    build_index(tmp_path / "here" / "cache", tmp_path / "here" / "index", IndexSettings(run=run_path))
    before = search(tmp_path / "here" / "index", ["red bar"], SearchSettings(k=3))
    (tmp_path / "here").rename(tmp_path / "there")
    assert search(tmp_path / "there" / "index", ["red bar"], SearchSettings(k=3)) == before
    (tmp_path / "there" / "index").rename(tmp_path / "index")
    with pytest.raises(PathError, match="does not exist"):
        search(tmp_path / "index", ["red bar"])
    there = SearchSettings(k=3, run=tmp_path / "there" / "run", cache=tmp_path / "there" / "cache")
    assert search(tmp_path / "index", ["red bar"], there) == before


def test_invalid_search_raises(index_path: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(index_path, tmp_path / "other"))
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps({**card, "format": 9}))
    for path, queries, error, word in (
        (index_path, [], SettingError, "query"),
        (index_path, ["red", " "], DataError, "empty"),
        (tmp_path / "no", ["red"], PathError, "exist"),
        (other, ["red"], ValueError, "index format 9"),
        (index_path, Queries(rows=[300]), UnknownNameError, "300"),
    ):
        with pytest.raises(error, match=word):
            search(path, queries)


def test_query_images_keys_and_vectors(cache_path: Path, image_folder: Path, run_path: Path, index_path: Path) -> None:
    pair = Run.open(run_path).pair
    images = project(pair.tower("image"), Inputs(Cache(cache_path).feature("image", "open_toy/cls").load()))
    paths = [image_folder / "00005.png", image_folder / "00012.png"]
    queries = Queries(images=paths, keys=["00005", "00012"], rows=[5, 12], vectors=3 * images[[5, 12]])
    assert queries.names == [*map(str, paths), "00005", "00012", "row 5", "row 12", "vector 0", "vector 1"]
    found = search(index_path, queries, SearchSettings(k=4))
    for number, hits in enumerate(found):
        row = (5, 12)[number % 2]
        scores = -np.sort(-(images @ images[row]))[:4]
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=2e-3)  # float16 at rest
        assert hits[0].row == row


def test_query_image_of_text_index(cache_path: Path, image_folder: Path, run_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path, modality="text"))
    pair = Run.open(run_path).pair
    cache = Cache(cache_path)
    image = project(pair.tower("image"), Inputs(cache.feature("image", "open_toy/cls").load()[5:6]))
    texts = project(pair.tower("text"), Inputs(cache.feature("text", "open_toy/mean").load()))
    (hits,) = search(tmp_path / "index", Queries(images=[image_folder / "00005.png"]), SearchSettings(k=3))
    np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-(texts @ image[0]))[:3], atol=2e-3)


def test_query_image_is_seen_through_the_view(image_folder: Path, tmp_path: Path) -> None:
    settings = ExtractSettings(views=("crop:0.5",))
    for name in ("00005", "00012"):
        (tmp_path / "s").mkdir(exist_ok=True)
        shutil.copy(image_folder / f"{name}.png", tmp_path / "s")
    extract(open_source(tmp_path / "s"), tmp_path / "cache", image_encoder=[IMAGE], settings=settings)
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(feature="open_toy@crop-0.5/cls"))
    (hits,) = search(tmp_path / "index", Queries(images=[image_folder / "00005.png"]), SearchSettings(k=1))
    assert (hits[0].key, hits[0].score) == ("00005", pytest.approx(1, abs=1e-3))


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    prompts = {"red": ["red bar left on white", "red bar top on blue"], "sky": ["blue bar top on white"]}
    (folder / "concepts.json").write_text(json.dumps(prompts))
    extract(open_source(f"prompts:{folder / 'concepts.json'}"), folder / "cache", text_encoder=[TEXT])
    return folder / "cache"


def test_query_concept_of_other_encoder_raises(cache_path: Path, concepts: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(feature="open_toy/mean", modality="text"))
    (hits,) = search(tmp_path / "index", Queries(concepts=["sky"], concept_cache=concepts), SearchSettings(k=1))
    assert hits[0].captions == ["blue bar top on white"]
    extract(
        open_source(f"prompts:{concepts.parent / 'concepts.json'}"),
        tmp_path / "other",
        text_encoder=[f"{TEXT},scale=2"],
    )
    with pytest.raises(FingerprintError, match="encoder"):
        search(tmp_path / "index", Queries(concepts=["sky"], concept_cache=tmp_path / "other"))


def test_query_concept_may_be_a_name_of_a_file(index_path: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\nblue")
    extract(open_source(f"prompts:{names}"), tmp_path / "prompts", text_encoder=[TEXT])
    hits, expected = (
        search(index_path, Queries(concepts=["red", "blue"], concept_cache=path), SearchSettings(k=3))
        for path in (names, tmp_path / "prompts")
    )
    assert [list(found) for found in hits] == [list(found) for found in expected]
    assert list(hits[0]) != list(hits[1])


def test_invalid_queries_raise(index_path: Path, concepts: Path, tmp_path: Path) -> None:
    index = OpenIndex(index_path)
    wrong: list[tuple[dict[str, Any], type[EmbedcacheError], str]] = [
        ({"keys": ["00001", "x"]}, UnknownNameError, "'x'"),
        ({"images": [tmp_path / "no.png"]}, PathError, "no.png"),
        ({"vectors": np.ones(15)}, DataError, r"\(1, 15\)"),
        ({"vectors": np.ones((2, 16, 16))}, DataError, r"\(2, 16, 16\)"),
        ({"vectors": np.eye(17, 16)}, DataError, "row 16"),
        ({"vectors": np.full((2, 16), np.nan)}, DataError, "NaN"),
        ({"concepts": ["rad"], "concept_cache": concepts}, UnknownNameError, "rad"),
    ]
    for options, error, word in wrong:
        with pytest.raises(error, match=word):
            index.search(Queries(**options))
    for vectors, word in ((np.ones(16), "expected"), (np.ones((2, 15)), "15"), (np.full((2, 16), np.nan), "finite")):
        with pytest.raises(DataError, match=word):
            index.search_vectors(vectors)


def test_files_of_vectors(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    with pytest.raises(PathError, match="v.npy"):
        read_vectors(path)
    path.write_bytes(b"no array")
    with pytest.raises(CorruptError, match="v.npy"):
        read_vectors(path)
    np.save(path, np.full((2, 16), 1j))
    with pytest.raises(CorruptError, match="complex128"):
        read_vectors(path)
    np.save(path, np.eye(2, 3))
    assert read_vectors(path).dtype == np.float32


def test_names_of_queries(image_folder: Path) -> None:
    image = Image.new("RGB", (4, 4))
    queries = Queries(
        texts="red bar",
        images=[image_folder / "00005.png", image],
        keys="00001",
        rows=[3, 4],
        concepts="red",
        concept_cache="prompts",
        vectors=np.ones(4),
    )
    path = str(image_folder / "00005.png")
    assert queries.names == ["red bar", path, "image 1", "00001", "row 3", "row 4", "red", "vector 0"]
    assert Queries(vectors=np.ones((2, 4))).names == ["vector 0", "vector 1"]
    assert Queries(vectors=torch.ones(4, dtype=torch.bfloat16, requires_grad=True)).vectors.tolist() == [1, 1, 1, 1]
    assert Queries(keys=(key for key in "ab"), rows=3).names == ["a", "b", "row 3"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"texts": [None]}, "texts"),
        ({"keys": [3]}, "keys"),
        ({"concepts": 3}, "concepts"),
        ({"images": 3}, "items"),
        ({"rows": [0, 1.5]}, "1.5"),
        ({"rows": [float("inf")]}, "inf"),
        ({"rows": [True]}, "True"),
        ({"rows": [1, 2**70]}, "64 bits"),
        ({"vectors": ["a"] * 32}, "vectors"),
        ({"vectors": [[1], [1, 2]]}, "vectors"),
    ],
)
def test_queries_of_another_type_raise(options: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        Queries(**options)
    with pytest.raises(SettingError, match="red"):
        Queries(concepts=["red", "sky"])


@pytest.mark.slow
def test_number_of_results(index_path: Path) -> None:
    index, queries = OpenIndex(index_path), Queries(keys=["00005", "00000"])
    for k, found in ((None, 10), (1, 1), (300, 300)):
        assert [len(hits) for hits in index.search(queries, k=k)] == [found] * 2
    for k in (0, 301):
        with pytest.raises(SettingError, match=f"got {k}"):
            index.search(queries, k=k)


def test_modalities_that_can_be_compared(index_path: Path, labeled_index: Path, concepts: Path, run_path: Path) -> None:
    projected, plain = OpenIndex(index_path).query_encoder, OpenIndex(labeled_index).query_encoder
    assert [projected.rejection(name) for name in ("image", "text")] == [None, None]
    assert "image and text" in str(projected.rejection("audio"))
    assert plain.rejection("image") is None
    assert "open_toy/cls" in str(plain.rejection("text"))
    for queries in (Queries(texts=["red"]), Queries(concepts=["red"], concept_cache=concepts)):
        with pytest.raises(DataError, match="open_toy/cls"):
            search(labeled_index, queries)
    with pytest.raises(FingerprintError, match="run"):
        OpenIndex(labeled_index, run=run_path)


def test_keys_without_an_indexed_item_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 4)
    for number in (1, 2):
        (folder / f"0000{number}.png").write_bytes(b"no image")
    extract(open_source(folder), tmp_path / "cache", image_encoder=[IMAGE])
    build_index(tmp_path / "cache", tmp_path / "index")
    index = OpenIndex(tmp_path / "index")
    with pytest.raises(DataError, match="00002"):
        index.search(Queries(keys=["00000", "00002", "00001"]))
    with pytest.raises(UnknownNameError, match="got 2"):
        index.search(Queries(rows=[3, 2]))


@pytest.mark.slow
@given(
    st.lists(st.booleans(), min_size=2, max_size=60).filter(any),
    st.sampled_from(["Flat", "HNSW8", "IVF2,Flat", "IVF2,SQfp16"]),
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
    effort = {"nprobe": 2, "efSearch": 64}
    is_allowed_N = np.zeros(1000, bool)
    is_allowed_N[rows[np.array(kept)]] = True
    scores, found = index.search(vectors[:3], k, effort, is_allowed_N=is_allowed_N)
    expected = -np.sort(-(vectors[:3] @ vectors[np.array(kept)].T), axis=1)[:, :k]
    np.testing.assert_allclose(scores, expected, atol=2e-3 if "fp16" in factory else 1e-5)
    assert np.isin(found, rows[np.array(kept)]).all()


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["Flat", "IVF2,SQ8"])
def test_label_and_part(labeled: Path, tmp_path: Path, factory: str) -> None:
    build_index(labeled, tmp_path / "index", IndexSettings(factory=factory, min_recall=0.0))
    cache, vectors = Cache(labeled), Vectors(labeled, "image")
    keys = np.array(cache.samples["key"].to_pylist())
    queries = Queries(keys=[str(keys[0]), str(keys[40])])
    query_vectors = vectors.read(np.array([0, 40]))
    write_selection(tmp_path / "one.parquet", cache, Selection(rows=np.array([5])), {})
    for keep, prefix in (
        (Filter(selection=tmp_path / "one.parquet"), (str(keys[5]),)),
        (Filter(label_value=("cat",)), ("train/cat", "val/cat")),
        (Filter(where="label = 'dog' and split != 'train'"), ("val/dog",)),
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


def test_part_of_run_split(cache_path: Path, run_path: Path, index_path: Path, tmp_path: Path) -> None:
    cache = Cache(cache_path)
    rows = read_split(run_path / "split.parquet", [cache]).rows("test")
    filters = CacheFilters(cache, "image", run_path)
    assert np.flatnonzero(filters.mask(Filter(part=("test",)))).tolist() == rows.tolist()
    assert filters.values("split")["test"] == len(rows)
    (hits,) = search(index_path, ["red bar"], SearchSettings(k=len(rows), filter=Filter(part=("test",))))
    assert sorted(hit.row for hit in hits) == rows.tolist()
    with pytest.raises(UnknownNameError, match="tset"):
        filters.mask(Filter(part=("tset",)))
    damaged = Path(shutil.copytree(run_path, tmp_path / "run"))
    split = read_split(run_path / "split.parquet", [cache])
    write_split(damaged / "split.parquet", [cache], replace(split, parts=["test"] * len(split.parts)))
    with pytest.raises(CorruptError, match="split"):
        CacheFilters(cache, "image", damaged).mask(Filter(part=("test",)))


@pytest.mark.slow
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
    with pytest.raises(UnknownNameError, match="fr"):
        search(tmp_path / "image", ask, SearchSettings(filter=Filter(language=("fr",))))


def test_invalid_filters_raise(labeled: Path, labeled_index: Path, tmp_path: Path) -> None:
    ask = Queries(keys=[Cache(labeled).samples["key"][0].as_py()])
    (tmp_path / "s.txt").write_text(ask.keys[0] + "\n")
    wrong: list[tuple[Filter, type[EmbedcacheError], str]] = [
        (Filter(label_value=("cta",)), UnknownNameError, "cta"),
        (Filter(where="lable = 'cat'"), UnknownNameError, "label"),
        (Filter(where="label = 'cta'"), DataError, "none"),
        (Filter(label_value=("cat",), part=("val",)), SettingError, "15 of 60"),
        (Filter(part=("val",), selection=tmp_path / "s.txt"), DataError, "none"),
    ]
    for condition, error, word in wrong:
        with pytest.raises(error, match=word):
            search(labeled_index, ask, SearchSettings(k=16, filter=condition))


def test_labels_are_in_the_named_column(labeled: Path, labeled_index: Path) -> None:
    ask = Queries(keys=[Cache(labeled).samples["key"][0].as_py()])
    condition = Filter(label_value=("train/dog",))
    (hits,) = search(labeled_index, ask, SearchSettings(k=15, label="folder", filter=condition))
    assert {(hit.label, hit.key.rpartition("/")[0]) for hit in hits} == {("train/dog", "train/dog")}
    filters = CacheFilters(Cache(labeled), "image", label="folder")
    assert filters.values("label") == {f"{part}/{name}": 15 for part in ("train", "val") for name in ("cat", "dog")}
    with pytest.raises(UnknownNameError, match="fodler"):
        search(labeled_index, ask, SearchSettings(label="fodler"))


def test_missing_labels_booleans_and_class_numbers_in_floating_point(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 4)
    table = {
        "image": [str(path) for path in sorted(folder.glob("*.png"))],
        "label": ["", "cat", "dog", None],
        "number": [1.0, np.nan, 2.0, None],
        "is_pet": [True, None, False, None],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    extract(open_source(tmp_path / "t.parquet"), tmp_path / "cache", image_encoder=[IMAGE])
    cache = Cache(tmp_path / "cache")
    columns = {
        "label": [None, "cat", "dog", None],
        "number": ["1", None, "2", None],
        "is_pet": ["true", None, "false", None],
    }
    for column, names in columns.items():
        hits = HitReader(cache, "image", label=column).read(np.zeros(4), np.arange(4))
        assert [hit.label for hit in hits] == names
        filters = CacheFilters(cache, "image", label=column)
        assert filters.values("label") == {name: 1 for name in names if name}
        assert filters.mask(Filter(label_value=(names[2] or "",))).tolist() == [False, False, True, False]


def test_values_are_counted_with_those_that_no_item_has(captioned: Path, labeled: Path) -> None:
    images, texts = (CacheFilters(Cache(captioned), modality) for modality in ("image", "text"))
    assert list(images.values("label").items()) == [("cat", 3), ("dog", 2)]
    assert list(texts.values("label").items()) == [("cat", 8), ("dog", 0)]
    assert (images.values("language"), texts.values("language")) == ({"de": 1}, {"de": 2})
    assert CacheFilters(Cache(labeled), "image").values("split") == {"train": 30, "val": 30}


def test_missing_columns_and_captions_are_named(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    cache, _ = import_files(
        open_vectors("clip-retrieval", write_tree(tmp_path / "tree", unit_rows(3))), tmp_path / "cache"
    )
    without_languages = CacheFilters(Cache(cache_path), "image", run_path)
    for filters in (CacheFilters(cache, "image"), CacheFilters(cache, "image", tmp_path)):
        assert [filters.values(name) for name in ("label", "split", "language")] == [{}, {}, {}]
        for condition in (Filter(label_value=("cat",)), Filter(part=("val",)), Filter(language=("de",))):
            with pytest.raises(UnknownNameError):
                filters.mask(condition)
    assert without_languages.values("label") == {}
    assert sum(without_languages.values("split").values()) == 300
    for condition in (Filter(label_value=("cat",)), Filter(language=("en",))):
        with pytest.raises(UnknownNameError):
            without_languages.mask(condition)


def test_a_fraction_of_the_items_is_searched_more_thoroughly(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the search of more items than are compared one by one: a quarter passes, so 4 times as many lists."""
    settings = IndexSettings(feature="open_toy/cls", factory="IVF8,SQ8", min_recall=0.0)
    build_index(labeled, tmp_path / "index", settings)
    index = OpenIndex(tmp_path / "index")
    index.card = replace_fields(index.card, search={"nprobe": 2})
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
    assert searches == [{"nprobe": 8}]
    assert hits[0].row == few[0].row == 0
    searches.clear()
    assert len(index.search_vectors(queries_QP, k=60)[0]) == 60  # not all are in two lists
    assert searches == [{"nprobe": 2}, {"nprobe": 8, "efSearch": 60}]


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


def test_samples_removed_since_are_not_found(labeled: Path, labeled_index: Path, tmp_path: Path) -> None:
    cache, key = Path(shutil.copytree(labeled, tmp_path / "cache")), "train/cat/00003"
    card = read_card(labeled_index)
    assert not may_hold_removed(card, Cache(cache))
    assert not may_hold_removed(
        replace_fields(card, index_digest="other"), Cache(cache)
    )  # grown, but nothing was removed
    remove_samples(cache, [key])
    assert may_hold_removed(card, Cache(cache))
    assert not may_hold_removed(replace_fields(card, index_digest=Cache(cache).info.index_digest), Cache(cache))
    index = OpenIndex(labeled_index, cache=cache)
    (hits,) = index.search(Queries(keys=["train/cat/00004"]), k=59)
    assert key not in {hit.key for hit in hits}
    assert (len(hits), index.count(Filter()), index.count(Filter(label_value=("cat",)))) == (59, 59, 29)
    assert (index.values("label"), index.values("split")) == ({"cat": 29, "dog": 30}, {"train": 29, "val": 30})
    with pytest.raises(SettingError, match="59 of 60"):
        index.search(Queries(keys=["train/cat/00004"]), k=60)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF1,SQfp16"])
def test_equal_items_are_found_in_the_order_of_their_rows(factory: str, tmp_path: Path) -> None:
    vectors = np.tile(unit_rows(40), (3, 1))
    vectors[81] = np.nan  # a failed item, which no filter counts
    labels = [f"part {row // 40}" for row in range(120)]
    tree = write_tree(tmp_path / "tree", vectors, rows_per_file=120, label=labels)
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    build_index(cache, tmp_path / "i", IndexSettings(modality="image", factory=factory, min_recall=0.0))
    index = OpenIndex(tmp_path / "i")
    for condition, num in ((Filter(), 3), (Filter(label_value=("part 1", "part 2")), 2)):
        found = index.search(Queries(rows=[5, 47, 119]), k=10, condition=condition)
        for row, hits in zip((5, 47, 119), found, strict=True):
            assert [hit.row for hit in hits[:num]] == [row % 40, row % 40 + 40, row % 40 + 80][-num:]
    assert index.values("label") == {"part 0": 40, "part 1": 40, "part 2": 39}
