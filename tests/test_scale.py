"""What is kept of millions of items is arrays: opening them makes no Python object for each."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scale_data import write_features, write_table
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split, write_split
from embedcache.store.cache import Cache
from embedcache.train.data import open_data

COUNT = 6000


@pytest.fixture(scope="module")
def pairs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    write_table(folder / "pairs.parquet", COUNT)
    write_features(folder / "pairs.parquet", folder / "cache")
    return folder / "cache"


def kept_objects(make: Callable[[], object]) -> int:
    """Return how many objects more there are while the result of a second call is kept."""
    make()
    gc.collect()
    before = sys.getallocatedblocks()
    kept = make()
    gc.collect()
    after = sys.getallocatedblocks()
    del kept
    return after - before


@pytest.mark.slow
def test_no_object_per_item(pairs_path: Path, tmp_path: Path) -> None:
    names = {"image": "open_made/vector", "text": "open_made/vector"}

    def open_feature() -> object:
        feature = Cache(pairs_path).feature("image")
        return feature, feature.valid, feature.hashes, feature.lengths()

    def open_pairs() -> object:
        data = open_data(pairs_path, names, memory_bytes=1)
        pairs = data.pairs(None)
        return data, pairs, data.keys, pairs.relation()

    def split() -> object:
        data = open_data(pairs_path, names, memory_bytes=1)
        written = data.split(data.pairs(None), SplitSettings(kind="key"))
        write_split(tmp_path / "split.parquet", data.caches, written)
        return written, read_split(tmp_path / "split.parquet", data.caches)

    def select() -> object:
        cache, rows = Cache(pairs_path), np.arange(0, COUNT, 2)
        path = tmp_path / "chosen.parquet"
        path.unlink(missing_ok=True)
        write_selection(path, cache, Selection(rows=rows), {})
        return read_selection(path, [cache])

    gc.collect()
    gc.freeze()  # what other tests hold, which each collection would go through
    kept = {make.__name__: kept_objects(make) for make in (open_feature, open_pairs, split, select)}
    assert max(kept.values()) < COUNT / 10, kept
