import gc
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import Inputs, normalize
from embedcache.errors import DataError, DiskFullError, FingerprintError, PathError, SettingError
from embedcache.projectors.base import project
from embedcache.registry import trust_files
from embedcache.runs import Run
from embedcache.search import faiss_index
from embedcache.search.faiss_index import read_card, read_index
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.store.cache import Cache
from tests.edits import edit_record

pytestmark = pytest.mark.slow


def test_card_content(cache_path: Path, index_path: Path) -> None:
    card = read_card(index_path)
    assert card.feature == "open_toy/cls"
    assert (card.num_vectors, card.width, card.factory) == (300, 16, "Flat")
    assert card.recall_at_10 == 1
    assert card.recall_at_1 == 1
    assert card.num_queries == 150  # half of the captions; the other half tunes
    assert card.search == {}
    assert card.memory_bytes == 300 * (16 * 4 + 8)
    assert {path.name for path in index_path.iterdir()} == {".lock", "card.json", "record.json", *card.files}
    assert list(card.files) == ["index-0.faiss", "index-0.rows.npy"]
    for name, file in card.files.items():
        assert file.num_bytes == (index_path / name).stat().st_size
    assert card.files["index-0.faiss"].num_bytes == pytest.approx(card.memory_bytes, rel=0.01)
    assert card.run_weights == Run.open(index_path / str(card.run)).info.weights


def test_same_index_is_reused(cache_path: Path, run_path: Path, index_path: Path, tmp_path: Path) -> None:
    before = (index_path / "index-0.faiss").stat().st_mtime_ns
    assert build_index(cache_path, index_path, IndexSettings(run=run_path)) == read_card(index_path)
    assert (index_path / "index-0.faiss").stat().st_mtime_ns == before
    with pytest.raises(FingerprintError, match="factory: stored 'Flat', requested 'HNSW8'"):
        build_index(cache_path, index_path, IndexSettings(run=run_path, factory="HNSW8"))


def test_folder_with_other_files_raises(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PathError, match=r"is not an index and not empty: it holds thesis\.tex"):
        build_index(cache_path, tmp_path, IndexSettings(run=run_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_index_of_a_smaller_width(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    card = build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path, width=5))
    assert (card.width, card.recall_at_10) == (5, 1)
    pair = Run.open(run_path).pair
    cache = Cache(cache_path)
    images, texts = (
        normalize(project(pair.tower(modality), Inputs(cache.feature(modality, name).load()))[:, :5])
        for modality, name in (("image", "open_toy/cls"), ("text", "open_toy/mean"))
    )
    words = cache.items("text")["text"].to_pylist()[:3]
    for query, scored in zip(search(tmp_path / "index", words, SearchSettings(k=5)), texts, strict=False):
        expected = np.sort(images @ scored)[::-1][:5]
        np.testing.assert_allclose([hit.score for hit in query], expected, atol=2e-3)  # float16 at rest
    (hits,) = search(tmp_path / "index", Queries(keys=["00007"]), SearchSettings(k=1))
    assert hits[0].key == "00007"
    with pytest.raises(FingerprintError, match="width: stored 5, requested 16"):
        build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path))
    with pytest.raises(SettingError, match="17"):
        build_index(cache_path, tmp_path / "other", IndexSettings(run=run_path, width=17))


def test_plain_index_of_a_smaller_width(cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(feature="open_toy/cls", width=3))
    values = normalize(Cache(cache_path).feature("image", "open_toy/cls").load()[:, :3])
    (hits,) = search(tmp_path / "index", Queries(rows=[4]), SearchSettings(k=4))
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(values @ values[4])[::-1][:4], atol=1e-5)


def test_cache_of_an_index_may_be_a_url(cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(feature="open_toy/cls"))
    for url, given in ((f"file://{cache_path}", None), ("file:///nowhere", cache_path)):
        edit_record(tmp_path / "index" / "card.json", cache=url)
        with trust_files():
            assert str(OpenIndex(tmp_path / "index", cache=given).cache.path).endswith(str(cache_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk_leaves_no_index(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        index = faiss_index.make_index("Flat", 48)
        index.add(np.arange(400), np.zeros((400, 48), np.float32))
        with pytest.raises(DiskFullError, match="free some space and rerun the same command"):
            index.write(tmp_path / "index.faiss")
        assert [path.name for path in tmp_path.iterdir()] == ["index.rows.npy"]
        subprocess.run(["mount", "-o", "remount,size=1m", tmp_path], check=True)
        index.write(tmp_path / "index.faiss")
        assert len(read_index([tmp_path / "index.faiss"])) == 400
    finally:
        gc.collect()  # what still maps a file of the disk keeps it busy
        subprocess.run(["umount", tmp_path], check=True)


def test_invalid_settings_raise(cache_path: Path, tmp_path: Path) -> None:
    for options, error, word in (
        ({"feature": "open_toy/cls", "factory": "HNS32"}, SettingError, "HNS32"),
        ({"feature": "open_toy/cls", "factory": "Flat", "memory": 10**6}, SettingError, "both"),
        ({"feature": "open_toy/patches"}, DataError, "patches"),
    ):
        with pytest.raises(error, match=word):
            build_index(cache_path, tmp_path / "x", **options)
