"""Which kinds of index are tried, and what is accepted of an index that is there already."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import CorruptError, SettingError
from embedcache.maintain.remove import remove_samples
from embedcache.provenance import read_json
from embedcache.search.card import read_card
from embedcache.search.faiss_index import read_index
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from tests.edits import edit_record
from tests.recorded import RecordedProgress
from tests.search.test_building import write_cache

CLS = "open_toy/cls"


@pytest.mark.slow
def test_kinds_with_fewer_bits_are_not_tried(cache_path: Path, tmp_path: Path) -> None:
    """Check 300 vectors of 48: of the kinds that fit, all have fewer bits than the first."""
    settings = IndexSettings(feature=CLS, memory=30_000, min_recall=1.0)
    progress = RecordedProgress()
    with pytest.raises(SettingError, match="IVF7,SQ8"):
        build_index(cache_path, tmp_path / "index", settings, progress=progress)
    recalls = json.loads((tmp_path / "index" / "building.json").read_text())["rejected"]
    assert list(recalls) == ["IVF7,SQ8"]
    progress = RecordedProgress()
    with pytest.raises(SettingError, match="IVF7,SQ8"):
        build_index(cache_path, tmp_path / "index", settings, progress=progress)
    assert progress.notes == []  # they are known
    card = build_index(cache_path, tmp_path / "index", settings, min_recall=recalls["IVF7,SQ8"], memory=21_000)
    assert (card.factory, card.recall_at_10) == ("IVF7,SQ8", recalls["IVF7,SQ8"])


def test_exact_index_reaches_every_recall(labeled: Path, tmp_path: Path) -> None:
    card = build_index(labeled, tmp_path / "index", IndexSettings(feature=CLS, min_recall=1.0))
    assert (card.factory, card.recall_at_10, card.memory_bytes) == ("Flat", 1, 60 * (4 * 48 + 8))
    assert card.seconds is not None
    assert card.seconds < 600
    assert card.seconds == round(card.seconds, 3)
    assert (card.num_training, card.format) == (0, 1)
    record = read_json(tmp_path / "index" / "record.json")
    assert record["outcome"] == {"recall_at_10": 1.0, "num_vectors": 60}
    assert "width" not in record["settings"]
    build_index(labeled, tmp_path / "narrow", IndexSettings(feature=CLS, width=5, min_recall=0.0))
    assert read_json(tmp_path / "narrow" / "record.json")["settings"]["width"] == 5


@pytest.fixture
def copy(labeled: Path, labeled_index: Path, tmp_path: Path) -> Path:
    """A copy of the exact index of sixty images, beside its cache."""
    shutil.copytree(labeled, tmp_path / "cache")
    return Path(shutil.copytree(labeled_index, tmp_path / "index"))


def build(copy: Path, **settings: Any) -> Any:
    return build_index(copy.parent / "cache", copy, IndexSettings(feature=CLS, **settings))


def test_memory_of_an_index_is_compared_with_the_limit(copy: Path) -> None:
    for memory_bytes, counted in ((12_000, 12_000), (None, read_card(copy).file_bytes)):
        assert counted is not None
        edit_record(copy / "card.json", memory_bytes=memory_bytes)
        assert build(copy, memory=counted).num_vectors == 60
        with pytest.raises(SettingError, match=f"{counted:,}"):
            build(copy, memory=counted - 1)
    edit_record(copy / "card.json", memory_bytes=6000, num_vectors=30)  # which grows to sixty
    with pytest.raises(SettingError, match="at most 11,999 bytes, got 12,000 with 60 items"):
        build(copy, memory=11_999)


def test_recall_of_an_index_is_compared_with_the_limit(copy: Path) -> None:
    edit_record(copy / "card.json", recall_at_10=0.75)
    assert build(copy, min_recall=0.75).recall_at_10 == 0.75
    with pytest.raises(SettingError, match="0.750"):
        build(copy, min_recall=0.76)


def test_damaged_index_is_not_extended(copy: Path) -> None:
    edit_record(copy / "card.json", num_vectors=59)
    data = (copy / "index.faiss").read_bytes()
    (copy / "index.faiss").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptError, match="index.faiss: expected checksum"):
        build(copy)


@pytest.mark.slow
def test_one_sample_removed_and_one_added(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 20)
    first = build_index(cache, tmp_path / "index")
    remove_samples(cache, ["00003"])
    write_cache(tmp_path, 21)
    progress = RecordedProgress()
    second = build_index(cache, tmp_path / "index", progress=progress)
    assert (first.num_vectors, second.num_vectors) == (20, 20)
    assert progress.notes == [
        "samples that the index holds were removed from the cache: adding all others again, without training"
    ]
    assert progress.started == [
        ("checking index.faiss", 1, "MiB"),
        ("indexing as Flat", 20, "images"),
        ("searching exactly", 20, "images"),
    ]
    assert read_index(tmp_path / "index" / "index.faiss").rows.tolist() == [*range(3), *range(4, 21)]
    outcome = read_json(tmp_path / "index" / "record.json")["outcome"]
    assert outcome == {
        "recall_at_10": 1.0,
        "num_vectors": 20,
        "recall_at_10_before": 1.0,
        "num_vectors_before": 20,
    }
    assert build_index(cache, tmp_path / "index") == second  # of the same samples, so nothing is built


@pytest.mark.slow
def test_index_of_removed_samples_is_kept_whatever_its_recall(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    settings = IndexSettings(feature=CLS)
    build_index(cache, tmp_path / "index", settings, factory="IVF1,PQ4x4", min_recall=0.0)
    edit_record(tmp_path / "index" / "card.json", recall_at_10=0.99)
    remove_samples(cache, ["00003"])
    card = build_index(cache, tmp_path / "index", settings)
    assert (card.num_vectors, card.memory_bytes) == (39, None)
    assert card.recall_at_10 < 0.95


@pytest.mark.slow
def test_memory_grows_with_the_items(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 19)
    assert build_index(cache, tmp_path / "index").memory_bytes == 19 * (4 * 48 + 8)
    write_cache(tmp_path, 21)
    assert build_index(cache, tmp_path / "index").memory_bytes == 21 * (4 * 48 + 8)


def test_one_image_has_no_neighbor(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 1)
    card = build_index(cache, tmp_path / "index")
    assert (card.num_vectors, card.num_queries, card.recall_at_1, card.recall_at_10) == (1, 1, 1, 1)
    np.testing.assert_array_equal(read_index(tmp_path / "index" / "index.faiss").rows, [0])
