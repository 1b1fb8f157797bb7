"""Hits as a table and as they are shown in a notebook: escaped, with few images, and none outside of the source."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import MissingExtraError
from embedcache.extract.extract import extract
from embedcache.reports.items import ItemRenderer
from embedcache.search import search as hits_module
from embedcache.search.queries import Queries
from embedcache.search.search import Hit, HitReader, Hits, OpenIndex, SearchResults, search
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.vectors.opening import open_vectors
from tests.images import write_images
from tests.toy import IMAGE
from tests.vectors.cases import import_files, unit_rows, write_tree


@pytest.fixture(scope="module")
def results(index_path: Path) -> SearchResults:
    index = OpenIndex(index_path)
    keys = [index.cache.key(row) for row in range(10)]
    return search(index, Queries(texts="<b>red</b>", keys=keys), k=20)


def test_cosines_are_at_most_one(results: SearchResults) -> None:
    scores = np.array([hit.score for hits in results for hit in hits])
    assert scores.max() <= 1
    assert [hits[0].score for hits in results[1:]] == pytest.approx([1] * 10, abs=1e-5)


def hit_of(label: str, *, row: int, **values: Any) -> Hit:
    key = f"{label}/{row:05}"
    return Hit(row=row, key=key, path=f"{key}.png", label=label, **values)


def test_hits_have_keys_files_labels_and_captions_of_one_language(captioned: Path) -> None:
    scores, rows = np.array([0.5, 2, -0.25, 0.125], np.float32), np.array([1, -1, 0, 3])  # nothing found: -1
    german = hit_of("cat", score=0.5, row=1, captions=["rot", "blau"], languages=["de", None])
    others = hit_of("cat", score=-0.25, row=0, captions=["one", "two", "three"], languages=[None])
    reader = HitReader(Cache(captioned), "image")
    for _ in range(2):
        dog = replace(hit_of("dog", score=0.125, row=0, captions=[], languages=[]), row=3)
        assert reader.read(scores, rows) == [german, others, dog]
        assert reader.read(scores[:3], rows[:3], ["de"]) == [
            replace(german, languages=["de"]),
            replace(others, captions=[], languages=[]),
        ]
        assert reader.captions(1) == [
            {"text": text, "language": language}
            for text, language in (("rot", "de"), ("blau", "de"), ("red", None), ("blue", None))
        ]
        reader.load()
    caption = replace(others, row=7, key="cat/00001", path=None, captions=["blue"])
    assert HitReader(Cache(captioned), "text").read(scores[2:3], np.array([7])) == [caption]


def test_hits_of_a_cache_without_captions_and_labels(tmp_path: Path) -> None:
    cache, _ = import_files(
        open_vectors("clip-retrieval", write_tree(tmp_path / "tree", unit_rows(3))), tmp_path / "cache"
    )
    found = HitReader(cache, "image").read(np.ones(2, np.float32), np.array([2, 0]))
    assert found == [Hit(score=1, row=row, key=f"k{row}", captions=[], languages=[]) for row in (2, 0)]


@pytest.mark.slow
def test_hits_name_files_that_keys_do_not_name(tmp_path: Path) -> None:
    write_images(tmp_path / "s" / "photos", 2)
    rows = "".join(f"photos/{number:05}.png,a {number}\n" for number in range(2))
    (tmp_path / "s" / "captions.csv").write_text(f"file,caption\n{rows}")
    extract(open_source(tmp_path / "s" / "captions.csv"), tmp_path / "cache", image_encoder=[IMAGE])
    (hit,) = HitReader(Cache(tmp_path / "cache"), "image").read(np.ones(1, np.float32), np.array([1]))
    assert (hit.key, hit.path, hit.name) == ("captions/1", "photos/00001.png", "00001.png")
    assert ItemRenderer(Cache(tmp_path / "cache"), "image").render(1).text == "captions/1 · 00001.png"


def test_data_frame_has_a_row_per_hit(results: SearchResults) -> None:
    frame = results.to_pandas()
    assert frame["key"].tolist() == [hit.key for hits in results for hit in hits]
    assert frame["query"][:20].tolist() == ["<b>red</b>"] * 20
    assert list(results[0].to_pandas().columns) == list(frame.columns)[1:]
    assert list(SearchResults().to_pandas().columns) == list(frame.columns)


def test_data_frame_needs_pandas(results: SearchResults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install pandas"):
        results.to_pandas()
    assert "HitReader" in runpy.run_path(str(hits_module.__file__))  # nothing else needs it


@pytest.mark.slow
def test_notebook_shows_thumbnails_of_some(results: SearchResults) -> None:
    page = results._repr_html_()
    assert page.count("data:image/webp;base64,") == 8 * 12
    assert results[0]._repr_html_().count("<img") == 12


def test_strange_captions_are_text(results: SearchResults) -> None:
    hits = results[0]
    hostile = replace(hits[0], captions=["<script>alert(1)</script>\x1b[2J", "x" * 1000], key='"><img src=//a>')
    page = Hits([hostile], query="&", cache=hits.cache, modality="image").to_html()
    assert "<script" not in page
    assert "src=//a" not in page.replace("&quot;&gt;&lt;img src=//a&gt;", "")
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\x1b[2J" in page
    assert "x" * 200 not in page
    assert set(re.findall(r"<(\w+)", page)) == {"b", "br", "div", "img", "small"}


def test_images_of_a_stranger_are_not_read(
    results: SearchResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    page = results[0].to_html()
    assert "<img" not in page
    assert "images are not shown: " in page
    assert results[0][0].captions[0] in page
