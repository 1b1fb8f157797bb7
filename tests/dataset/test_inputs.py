from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import Inputs
from embedcache.dataset.inputs import InputFeature, open_input, to_inputs, to_unit_vectors
from embedcache.errors import DataError
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from tests.store.features import random_items, write_feature


def test_open_input_reads_no_hashes(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feature, "hashes", property(lambda _: pytest.fail("hashes are read")))
    feature = open_input(Cache(cache_path), "image", "open_toy/cls")
    assert len(feature.read(np.array([2, 0])).values) == 2


def test_joined_features_are_concatenated(cache_path: Path) -> None:
    cache, rows = Cache(cache_path), np.array([3, 1])
    once, twice = (
        open_input(cache, "image", name) for name in ("open_toy/patches", "open_toy/patches+open_toy/patches")
    )
    patches = once.read(rows).values
    np.testing.assert_array_equal(twice.read(rows).values, np.concatenate([patches, patches], axis=1))


def test_joined_features_of_other_width_raises(cache_path: Path) -> None:
    with pytest.raises(DataError, match="open_toy/cls of width 48 and open_toy/patches of width 3"):
        open_input(Cache(cache_path), "image", "open_toy/cls+open_toy/patches")


def test_ragged_feature_comes_last() -> None:
    tokens = [np.ones((2, 3)), np.ones((4, 3))]
    assert to_inputs([[np.zeros(3)] * 2, tokens]).lengths.tolist() == [3, 5]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="must come last"):
        to_inputs([tokens, [np.zeros(3)] * 2])


def test_chunk_of_failed_items_is_empty(tmp_path: Path) -> None:
    items = random_items(8, (-1, 5), seed=1, failed=range(4))
    feature = InputFeature([write_feature(tmp_path, items, (-1, 5), chunk_size=4)])
    rows, inputs = feature.chunk(0)
    assert (len(rows), inputs.values.shape) == (0, (0, 5))
    assert feature.chunk(1)[0].tolist() == [4, 5, 6, 7]


def test_unit_vectors_of_tokens() -> None:
    values = np.array([[[3.0, 0], [5, 0]], [[0, 2], [0, 0]]])
    assert to_unit_vectors(Inputs(values, np.array([2, 1]))).tolist() == [[1, 0], [0, 1]]
