"""Candidate configurations and exact search."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import normalize
from embedcache.errors import SettingError
from embedcache.search.faiss_index import make_index
from embedcache.search.index import (
    Configuration,
    fit_memory,
    in_memory_configurations,
    num_lists,
    on_disk_configurations,
)

GB = 1024**3


@pytest.mark.parametrize(
    ("num_vectors", "width", "memory", "first"),
    [
        (1_000, 768, None, "Flat"),
        (200_000, 768, None, "Flat"),
        (200_001, 768, None, "HNSW32"),
        (1_000_000, 768, 4 * GB, "HNSW32"),
        (1_000_000, 768, 3 * GB, "IVF2048,SQfp16"),
        (1_000_000, 768, 4 * GB // 5, "IVF2048,SQ8"),
        (1_000_000, 768, 7 * GB // 10, "IVF2048,SQ6"),
        (1_000_000, 768, GB // 4, "IVF2048,PQ192"),
        (100_000_000, 768, 100 * GB, "IVF16384_HNSW32,SQ8"),
        (100, 16, 5_000, "IVF2,SQfp16"),
    ],
)
def test_memory_chooses_configuration(num_vectors: int, width: int, memory: int | None, first: str) -> None:
    assert fit_memory(in_memory_configurations(num_vectors, width), memory)[0].factory == first


@given(st.integers(1, 10**9), st.integers(1, 4096))
def test_num_lists_can_be_trained(num_vectors: int, width: int) -> None:
    lists = num_lists(num_vectors)
    assert lists == 1 or lists * 39 <= num_vectors
    every = in_memory_configurations(num_vectors, width)
    smallest = min(one.memory_bytes for one in every)
    assert fit_memory(every, smallest)
    with pytest.raises(SettingError, match=f"expected at least {smallest:,} bytes.*: give --memory"):
        fit_memory(every, smallest - 1)


def test_memory_of_each_kind() -> None:
    """Check codes, tables and two ids of 8 bytes per vector, and float32 centroids."""
    num, centroids, bounds = 10_000, 256 * 4 * 64, 8 * 64
    assert [(one.factory, one.memory_bytes) for one in in_memory_configurations(num, 64)] == [
        ("Flat", num * (256 + 8)),
        ("HNSW32", num * (256 + 272 + 8)),
        ("IVF256,SQfp16", num * (128 + 16) + centroids),
        ("IVF256,SQ8", num * (64 + 16) + centroids + bounds),
        ("IVF256,SQ6", num * (48 + 16) + centroids + bounds),
        ("IVF256,PQ16", num * (16 + 16) + centroids + 256 * 4 * 64),
    ]
    (kind,) = on_disk_configurations(num, 64)
    assert (kind.factory, kind.memory_bytes) == ("IVF256,SQfp16", num * 16 + centroids + 256 * 24)
    with_graph = 16_384 * (4 * 768 + 272)
    assert in_memory_configurations(10**8, 768)[-1].memory_bytes == 10**8 * (192 + 16) + with_graph + 4 * 256 * 768
    assert on_disk_configurations(10**8, 768)[0].memory_bytes == 10**8 * 16 + with_graph + 16_384 * 24


@pytest.mark.parametrize(("num_vectors", "width", "has_pq"), [(9984, 64, True), (9983, 64, False), (9984, 66, False)])
def test_product_codes_need_39_vectors_per_centroid_and_groups_of_four(
    num_vectors: int, width: int, has_pq: bool
) -> None:
    names = [one.factory for one in in_memory_configurations(num_vectors, width)]
    assert any("PQ" in name for name in names) == has_pq


def test_number_of_lists() -> None:
    for num_vectors, lists in (
        *((1, 1), (77, 1), (78, 2), (200, 5), (9983, 255), (10**4, 256), (10**5, 512), (10**6, 2048)),
        *((2**25 - 1, 8192), (2**25, 16_384), (10**8, 16_384), (10**9, 65_536)),
    ):
        assert num_lists(num_vectors) == lists


def test_too_little_memory_names_the_smallest_in_whole_kilobytes() -> None:
    larger = Configuration(factory="SQ8", memory_bytes=9000)
    for memory_bytes, kilobytes in ((2048, "2K"), (2049, "3K")):
        kinds = [larger, Configuration(factory="SQ4", memory_bytes=memory_bytes)]
        with pytest.raises(SettingError, match=f"--memory {kilobytes}"):
            fit_memory(kinds, 1024)
        assert fit_memory(kinds, memory_bytes) == kinds[1:]
        assert fit_memory(kinds, None) == kinds


@pytest.mark.parametrize("configuration", in_memory_configurations(2000, 64), ids=lambda one: one.factory)
def test_index_size_matches_formula(configuration: Configuration, tmp_path) -> None:  # type: ignore[no-untyped-def]
    index = make_index(configuration.factory, 64)
    vectors = normalize(np.random.default_rng(0).standard_normal((2000, 64)))
    if not index.is_trained:
        index.train(vectors)
    index.add(np.arange(2000), vectors)
    index.write(tmp_path / "index.faiss")
    paths = [path for path in tmp_path.iterdir() if index.num_lists or path.suffix == ".faiss"]  # rows twice, or once
    assert sum(path.stat().st_size for path in paths) == pytest.approx(configuration.memory_bytes, rel=0.03)
