"""A source that changed since a cache numbered it: what is taken in, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Array
from embedcache.errors import FingerprintError
from embedcache.sources import FileItem, Sample, TextItem
from embedcache.store.cache import Cache
from embedcache.store.group import add_feature, create_group
from embedcache.store.indexing import index
from embedcache.store.layout import read_info
from embedcache.store.writer import commit_chunk
from tests.store.test_indexing import Rows, rows

CHUNK = 4


def begin(path: Path, source: Rows, *, failed: tuple[int, ...] = (), encoder: str = "test") -> None:
    """Index a source, and commit a feature of all its images, of which some failed."""
    info = index(source, path, chunk_size=CHUNK)
    group = create_group(path, "image", encoder, info, spec="test:m", fingerprint={"weights": "w"})
    add_feature(group, "f", (2,), "float32")
    for chunk in range(info.num_chunks("image")):
        span = info.chunk_rows("image", chunk)
        numbers = range(span.start, span.stop)
        items: list[Array | None] = [None if row in failed else vector(row) for row in numbers]
        reasons = ["broken" if row in failed else None for row in numbers]
        commit_chunk(group, chunk, {"f": items}, [row.to_bytes(16, "big") for row in numbers], {"f": reasons})


def vector(row: int) -> Array:
    return np.full(2, row, np.float32)


def sample(name: str) -> Sample:
    return Sample(key=name, images=(FileItem(path=f"{name}.png", length=1),), texts=(TextItem(text=name),))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=6), st.integers(1, 10))
def test_extend_appends_new_samples(tmp_path_factory: pytest.TempPathFactory, places: list[int], num_old: int) -> None:
    path = tmp_path_factory.mktemp("c")
    old = rows(num_old)
    begin(path, old)
    longer = list(old.rows)
    for number, place in enumerate(places):
        longer.insert(min(place, len(longer)), sample(f"new{number}"))
    index(Rows(longer), path, extend=True)
    cache = Cache(path)
    new = [one.key for one in longer if one.key.startswith("new")]
    assert cache.samples["key"].to_pylist() == [*(one.key for one in old.rows), *new]
    assert cache.items("image")["path"].to_pylist()[num_old:] == [f"{key}.png" for key in new]
    assert cache.items("image")["sample"].to_pylist() == list(range(num_old + len(new)))
    chunks = [cache.items("image", chunk=chunk) for chunk in range(cache.info.num_chunks("image"))]
    assert [path for chunk in chunks for path in chunk["path"].to_pylist()] == cache.items("image")["path"].to_pylist()
    assert index(Rows(longer), path) == cache.info, "the longer source is the cache's source now"


def test_extend_keeps_stored_features(tmp_path: Path) -> None:
    old = rows(6)
    begin(tmp_path, old)
    index(Rows([sample("a"), *old.rows]), tmp_path, extend=True)
    feature = Cache(tmp_path).feature("image", "test/f")
    assert feature.valid.tolist() == [True] * 6 + [False]
    assert feature.gather(feature.valid.nonzero()[0])[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert not feature.group.has(feature.group.commit(1), "f")
    assert feature.group.has(feature.group.commit(0), "f")


def test_extend_repeatedly(tmp_path: Path) -> None:
    source = rows(3)
    begin(tmp_path, source)
    for number in range(4):
        source = Rows([sample(f"{9 - number}"), *source.rows])
        info = index(source, tmp_path, extend=True)
    assert [part.num_samples for part in info.all_segments] == [3, 1, 1, 1, 1]
    assert Cache(tmp_path).samples["key"].to_pylist() == ["k0", "k1", "k2", "9", "8", "7", "6"]
    assert index(source, tmp_path) == info
    with pytest.raises(FingerprintError, match="sample '8' is missing"):
        index(Rows([one for one in source.rows if one.key != "8"]), tmp_path)


def changed(source: Rows, row: int, **fields: object) -> Rows:
    return Rows([replace(one, **fields) if number == row else one for number, one in enumerate(source.rows)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (rows(5), "sample 'k5' is missing or out of order"),
        (
            Rows([*rows(6).rows[:4], rows(6).rows[5], rows(6).rows[4]]),
            "sample 'k5' is missing or out of order",
        ),
        (Rows([*rows(6).rows, sample("a")]), "it has 1 more;.*append them with --extend"),
        (changed(rows(6), 2, texts=(TextItem(text="other"),)), "sample 'k2' has other captions"),
        (changed(rows(6), 2, images=(FileItem(path="x.png", length=2),)), "sample 'k2' has other images"),
        (
            changed(rows(6), 2, images=(FileItem(path="2.png", length=9),)),
            "other bytes in 1 of its images, such as 2.png in row 2",
        ),
        (changed(rows(6), 2, columns={"label": 5}), "columns or languages of its samples differ"),
    ],
    ids=["gone", "reordered", "added", "caption", "image", "bytes", "columns"],
)
def test_changed_source_raises(tmp_path: Path, now: Rows, words: str) -> None:
    begin(tmp_path, rows(6))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FingerprintError, match=words):
        index(now, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_replaced_failed_image_is_accepted(tmp_path: Path) -> None:
    begin(tmp_path, rows(6), failed=(2,))
    mended = changed(rows(6), 2, images=(FileItem(path="2.png", length=9),))
    with pytest.raises(FingerprintError, match="1 of its failed images have other bytes now;.*with --retry-failed"):
        index(mended, tmp_path)
    info = index(mended, tmp_path, accept_replaced=True)
    assert index(mended, tmp_path) == info == read_info(tmp_path)
    cache = Cache(tmp_path)
    assert cache.items("image")["length"].to_pylist() == [0, 1, 9, 3, 4, 5]
    assert cache.feature("image").valid.tolist() == [True, True, False, True, True, True], "commits are good still"


def test_replaced_image_of_another_encoder_raises(tmp_path: Path) -> None:
    begin(tmp_path, rows(6), failed=(2,))
    begin(tmp_path, rows(6), encoder="other")
    mended = changed(rows(6), 2, images=(FileItem(path="2.png", length=9),))
    with pytest.raises(FingerprintError, match="other bytes in 1 of its images, such as 2.png in row 2"):
        index(mended, tmp_path, accept_replaced=True)


def test_replaced_image_with_features_raises(tmp_path: Path) -> None:
    begin(tmp_path, rows(6), failed=(2,))
    with pytest.raises(FingerprintError, match="other bytes in 1 of its images, such as 3.png in row 3"):
        index(changed(rows(6), 3, images=(FileItem(path="3.png", length=8),)), tmp_path, accept_replaced=True)
