import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import normalize
from embedcache.errors import SettingError
from embedcache.search.autotune import (
    Configuration,
    configurations,
    fit_memory,
    num_lists,
    on_disk,
    remaining_candidates,
)
from embedcache.search.faiss_index import make_index

GB = 1024**3


@pytest.mark.parametrize(
    ("num_vectors", "width", "memory", "first"),
    [
        (1_000, 768, None, "Flat"),
        (200_000, 768, None, "Flat"),
        (200_001, 768, None, "HNSW32"),
        (1_000_000, 768, 4 * GB, "HNSW32"),
        (1_000_000, 768, 3 * GB, "IVF2048,SQfp16"),
        (1_000_000, 768, GB, "IVF2048,RaBitQ,Refine(SQ8)"),
        (1_000_000, 768, 4 * GB // 5, "IVF2048,SQ8"),
        (1_000_000, 768, 7 * GB // 10, "IVF2048,SQ6"),
        (1_000_000, 768, GB // 2, "IVF2048,RaBitQ4"),
        (1_000_000, 768, GB // 4, "IVF2048,PQ192"),
        (1_000_000, 768, GB // 8, "IVF2048,RaBitQ"),
        (1_000_000, 770, GB // 4, "IVF2048,RaBitQ"),
        (100_000_000, 768, 100 * GB, "IVF16384_HNSW32,RaBitQ,Refine(SQ8)"),
        (100, 16, 5_000, "IVF2,SQfp16"),
    ],
)
def test_memory_chooses_the_kind(num_vectors: int, width: int, memory: int | None, first: str) -> None:
    assert fit_memory(configurations(num_vectors, width), memory)[0].factory == first


@given(st.integers(1, 10**9), st.integers(1, 4096))
def test_lists_are_never_more_than_can_be_trained(num_vectors: int, width: int) -> None:
    lists = num_lists(num_vectors)
    assert lists == 1 or lists * 39 <= num_vectors
    every = configurations(num_vectors, width)
    smallest = min(one.memory_bytes for one in every)
    assert fit_memory(every, smallest)
    with pytest.raises(SettingError, match=f"takes {smallest:,}: give --memory"):
        fit_memory(every, smallest - 1)


def test_on_the_disk_only_centroids_and_rows_are_memory() -> None:
    (kind,) = fit_memory(on_disk(100_000_000, 768), 2 * GB)
    assert (kind.factory, kind.is_on_disk) == ("IVF16384_HNSW32,SQfp16", True)
    with pytest.raises(SettingError, match=r"the smallest, IVF16384_HNSW32,SQfp16, takes 1,6\d\d,.*K or more$"):
        fit_memory(on_disk(100_000_000, 768), GB)


@pytest.mark.parametrize("configuration", configurations(2000, 64), ids=lambda one: one.factory)
def test_an_index_is_as_large_as_the_formula_says(configuration: Configuration, tmp_path) -> None:  # type: ignore[no-untyped-def]
    index = make_index(configuration.factory, 64)
    vectors = normalize(np.random.default_rng(0).standard_normal((2000, 64)))
    if not index.is_trained:
        index.train(vectors)
    index.add(np.arange(2000), vectors)
    index.write(tmp_path / "index")
    assert (tmp_path / "index").stat().st_size == pytest.approx(configuration.memory_bytes, rel=0.03)


def test_after_lists_that_failed_only_finer_codes_are_tried() -> None:
    kinds = configurations(1_000_000, 768)
    graph, lists = kinds[0], kinds[1]
    assert remaining_candidates(kinds[1:], graph) == kinds[1:]
    assert remaining_candidates(kinds[2:], lists) == []
