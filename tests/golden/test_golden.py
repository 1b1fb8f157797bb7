"""Caches of all format versions open with the same values."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from embedcache.store.cache import Cache
from embedcache.store.layout import FORMAT_VERSION
from tests.golden.make import FOLDER, expected

VERSIONS = range(1, FORMAT_VERSION + 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_cache_values(version: int) -> None:
    cache = Cache(FOLDER / f"cache-{version}")
    found = expected(cache)
    with np.load(FOLDER / f"cache-{version}.npz") as golden:
        assert set(found) == set(golden.files)
        for name in golden.files:
            np.testing.assert_array_equal(found[name], golden[name], err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_cache_tables(version: int) -> None:
    cache = Cache(FOLDER / f"cache-{version}")
    assert cache.info.num_samples == 10
    assert cache.samples["key"].to_pylist() == [f"{row:05d}" for row in range(10)]
    assert cache.items("text")["sample"].to_pylist() == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert cache.feature("image", "open_toy/cls").failures == {3: "empty file"}
    assert cache.feature("text", "open_toy/mean").failures == {7: "empty caption"}
    assert list(cache.feature("image", "open_toy/cls").chunks())


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_cache_in_plain_zarr(version: int) -> None:
    path: Path = FOLDER / f"cache-{version}" / "image" / "open_toy"
    with np.load(FOLDER / f"cache-{version}.npz") as golden:
        values = zarr.open_group(path, mode="r")["cls"][:]
        np.testing.assert_array_equal(values[golden["cls valid"]], golden["cls"])
