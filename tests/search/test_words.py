"""Words of captions: BM25 as its formula says, fused by ranks, stored with the index, and never a query language."""

import json
import math
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import DataError, SettingError
from embedcache.extract.extract import extract
from embedcache.provenance import to_metadata
from embedcache.search import words as words_module
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search
from embedcache.search.settings import Filter, IndexSettings, SearchSettings
from embedcache.search.words import FILE, count_words, fuse, open_words
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.store.tables import write_table
from tests.images import write_images
from tests.toy import IMAGE, TEXT

CAPTIONS = ["red dog", "A RED, red café-bike", "", "日本 2", "the dog's 2nd bone", "é e * -", "cafe"] * 3


def words_of(text: str) -> list[str]:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not "\u0300" <= c <= "\u036f")
    return [word for word in re.split(r"[\W_]+", plain) if word]


def bm25(captions: list[str], query: str) -> list[float]:
    documents = [words_of(caption) for caption in captions]
    mean = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in set(words_of(query)):
        num = sum(word in document for document in documents)
        for row, document in enumerate(documents):
            count = document.count(word)
            norm = 1.2 * (0.25 + 0.75 * len(document) / mean)
            scores[row] += math.log(1 + (len(documents) - num + 0.5) / (num + 0.5)) * count * 2.2 / (count + norm)
    return scores


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    index(open_source(folder / "captions.txt"), folder / "cache")
    return Cache(folder / "cache")


QUERIES = st.lists(
    st.sampled_from(["red", "RED", "Café", "dog", "s", "2", "日本", "-", "*", '"', "NEAR(", "e"]), max_size=5
)


@given(QUERIES.map(" ".join))
def test_scores_equal_the_formula(texts: Cache, query: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "_BLOCK", 4)
        scores = count_words(texts).scores(query)
    np.testing.assert_allclose(scores, bm25(CAPTIONS, query), rtol=1e-5)


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=3), st.integers(1, 6))
def test_fused_scores_are_sums_of_reciprocal_ranks(rankings: list[list[int]], k: int) -> None:
    expected = {row: sum(1 / (61 + ranked.index(row)) for ranked in rankings) for row in range(6)}
    scores = np.arange(6, 0, -1).astype(np.float32)
    sums, rows = fuse([(scores, np.array(ranked)) for ranked in rankings], k)
    np.testing.assert_allclose(sums, sorted(expected.values(), reverse=True)[:k], rtol=1e-6)
    np.testing.assert_allclose(sums, [expected[row] for row in rows.tolist()], rtol=1e-6)
    tied, _ = fuse([(np.ones(6, np.float32), np.arange(6))], 6)
    np.testing.assert_allclose(tied, 1 / 61, rtol=1e-6)


def test_words_are_stored_and_compared(texts: Cache, tmp_path: Path) -> None:
    scores = open_words(tmp_path, texts).scores("red dog")
    path = tmp_path / FILE
    stored = path.read_bytes()
    open_words(tmp_path, texts)
    assert path.read_bytes() == stored
    table = count_words(texts).table
    offsets = table["captions"].combine_chunks().offsets
    others = (pa.array(np.full(offsets[-1].as_py(), row, np.int32)) for row in (99, -1))
    for wrong in (
        table.replace_schema_metadata(to_metadata({"format": 1})),  # of another cache
        *(table.set_column(1, "captions", pa.LargeListArray.from_arrays(offsets, rows)) for rows in others),
    ):
        write_table(
            path, wrong.replace_schema_metadata(wrong.schema.metadata or to_metadata(words_module._about(texts)))
        )
        np.testing.assert_array_equal(open_words(tmp_path, texts).scores("red dog"), scores)
    path.write_bytes(stored[:-30] + b"x" * 30)
    np.testing.assert_array_equal(open_words(tmp_path, texts).scores("red dog"), scores)
    assert path.read_bytes() == stored


@pytest.mark.slow
def test_search_by_words_and_both(index_path: Path, tmp_path: Path) -> None:
    opened = OpenIndex(index_path)
    captions = opened.cache.items("text")["text"].to_pylist()
    for query in ("red bar left", "bar AND bar", "white"):
        scores = np.array(bm25(captions, query))
        (hits,) = search(opened, query, SearchSettings(k=7, match="words"))
        order = np.lexsort((np.arange(len(scores)), -scores.astype(np.float32)))[:7]
        assert [hit.row for hit in hits] == [row for row in order.tolist() if scores[row]]
        np.testing.assert_allclose([hit.score for hit in hits], scores[[hit.row for hit in hits]], rtol=1e-4)
    query = "red bar left"
    (near,), (both,) = (search(opened, query, SearchSettings(k=100, match=match)) for match in ("vectors", "both"))
    scores = np.array(bm25(captions, query)).astype(np.float32)
    ranks = 1 + (scores[None] > scores[:, None]).sum(axis=1)
    expected = {hit.row: 1 / (61 + place) for place, hit in enumerate(near)}
    expected |= {
        row: expected.get(row, 0) + 1 / (60 + ranks[row])
        for row in np.flatnonzero((scores > 0) & (ranks <= 100)).tolist()
    }
    np.testing.assert_allclose([hit.score for hit in both], sorted(expected.values(), reverse=True)[:100], rtol=1e-5)
    (few,) = search(opened, query, SearchSettings(k=3, match="words", filter=Filter(part=("test",))))
    assert {hit.row for hit in few} <= set(np.flatnonzero(opened.filters.mask(Filter(part=("test",)))).tolist())
    assert search(opened, "zebra", SearchSettings(match="words")) == [[]]


@pytest.mark.slow
def test_words_in_a_language_without_an_encoder_of_texts(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 12)
    for path in sorted((tmp_path / "photos").glob("*.txt"))[:4]:
        path.with_suffix(".json").write_text(json.dumps({"caption": f"rot {path.stem}", "language": "de"}))
    extract(open_source(tmp_path / "photos"), tmp_path / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(modality="image"))
    (hits,) = search(tmp_path / "index", "rot bar", SearchSettings(match="words", filter=Filter(language=("de",))))
    assert sorted(hit.row for hit in hits) == [0, 1, 2, 3]
    with pytest.raises(SettingError, match="match"):
        search(tmp_path / "index", Queries(keys=["00000"]), SearchSettings(match="both"))


def test_words_need_captions(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 8)
    for path in photos.glob("*.txt"):
        path.unlink()
    extract(open_source(photos), tmp_path / "cache", image_encoder=[IMAGE])
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(modality="image"))
    with pytest.raises(DataError, match="captions"):
        search(tmp_path / "index", "red", SearchSettings(match="words"))
