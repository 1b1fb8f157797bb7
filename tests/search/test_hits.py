"""Hits as a table and as they are shown in a notebook: escaped, with few images, and none outside of the source."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import MissingExtraError
from embedcache.search.hits import Hits, SearchResults
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search


@pytest.fixture(scope="module")
def results(index_path: Path) -> SearchResults:
    index = OpenIndex(index_path)
    keys = [index.cache.key(row) for row in range(10)]
    return search(index, Queries(texts="<b>red</b>", keys=keys), k=20)


def test_cosines_are_at_most_one(results: SearchResults, index_path: Path) -> None:
    scores = np.array([hit.score for hits in results for hit in hits])
    assert scores.max() <= 1
    assert [hits[0].score for hits in results[1:]] == pytest.approx([1] * 10, abs=1e-5)
    index = OpenIndex(index_path)
    too_large = index.hits.read(np.array([1.0000001, -1.0000001], np.float32), np.array([0, 1]))
    assert [hit.score for hit in too_large] == [1, -1]


def test_data_frame_has_a_row_per_hit(results: SearchResults) -> None:
    frame = results.to_pandas()
    assert list(frame.columns) == ["query", "score", "row", "key", "captions", "label", "languages"]
    assert frame["key"].tolist() == [hit.key for hits in results for hit in hits]
    assert frame["query"][:20].tolist() == ["<b>red</b>"] * 20
    assert list(results[0].to_pandas().columns) == ["score", "row", "key", "captions", "label", "languages"]
    assert list(SearchResults().to_pandas().columns) == list(frame.columns)


def test_data_frame_needs_pandas(results: SearchResults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"'embedcache\[pandas\]'"):
        results.to_pandas()


def test_notebook_shows_thumbnails_of_some(results: SearchResults) -> None:
    page = results._repr_html_()
    assert page.count("data:image/webp;base64,") == 8 * 12
    assert page.count("… and 8 more") == 8
    assert "… and 3 more queries" in page
    assert "<b>&lt;b&gt;red&lt;/b&gt;</b>" in page
    assert results[0]._repr_html_().count("<img") == 12
    assert len(page) < 400_000


def test_strange_captions_are_text(results: SearchResults) -> None:
    hits = results[0]
    hostile = replace(hits[0], captions=["<script>alert(1)</script>\x1b[2J", "x" * 1000], key='"><img src=//a>')
    page = Hits([hostile], query="&", cache=hits.cache, modality="image").to_html()
    assert "<script" not in page
    assert "src=//a" not in page.replace("&quot;&gt;&lt;img src=//a&gt;", "")
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\x1b[2J" in page
    assert "x" * 200 not in page
    assert set(re.findall(r"<(\w+)", page)) == {"b", "br", "div", "img", "small"}


def test_images_are_read_below_the_image_folder_only(results: SearchResults, tmp_path: Path) -> None:
    page = results[0].to_html(image_folder=tmp_path)
    assert "<img" not in page
    assert "images are not shown: " in page
    assert results[0][0].captions[0] in page


def test_captions_have_no_images(results: SearchResults) -> None:
    hits = results[0]
    page = Hits(hits, query="q", cache=hits.cache, modality="text").to_html()
    assert "<img" not in page
    assert "not shown" not in page
