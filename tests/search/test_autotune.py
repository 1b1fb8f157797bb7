"""Candidate configurations, exact search, recall and search parameters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, normalize
from embedcache.errors import SettingError
from embedcache.search.autotune import (
    Configuration,
    drop_own,
    fit_memory,
    in_memory_configurations,
    make_query_set,
    num_lists,
    on_disk_configurations,
    parameter_choices,
    remaining_candidates,
)
from embedcache.search.faiss_index import exact_search, make_index

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


def test_on_disk_memory_excludes_codes() -> None:
    (kind,) = fit_memory(on_disk_configurations(100_000_000, 768), 2 * GB)
    assert (kind.factory, kind.is_on_disk) == ("IVF16384_HNSW32,SQfp16", True)
    with pytest.raises(SettingError, match=r"at least 1,6\d\d,.* bytes, .* IVF16384_HNSW32,SQfp16, takes.*K or more$"):
        fit_memory(on_disk_configurations(100_000_000, 768), GB)


@pytest.mark.parametrize("configuration", in_memory_configurations(2000, 64), ids=lambda one: one.factory)
def test_index_size_matches_formula(configuration: Configuration, tmp_path) -> None:  # type: ignore[no-untyped-def]
    index = make_index(configuration.factory, 64)
    vectors = normalize(np.random.default_rng(0).standard_normal((2000, 64)))
    if not index.is_trained:
        index.train(vectors)
    index.add(np.arange(2000), vectors)
    index.write(tmp_path / "index")
    assert (tmp_path / "index").stat().st_size == pytest.approx(configuration.memory_bytes, rel=0.03)


def test_remaining_candidates_keep_finer_codes() -> None:
    kinds = in_memory_configurations(1_000_000, 768)
    graph, lists = kinds[0], kinds[1]
    assert remaining_candidates(kinds[1:], graph) == kinds[1:]
    assert remaining_candidates(kinds[2:], lists) == []


def unit(count: int, width: int, seed: int) -> Floats:
    return normalize(np.random.default_rng(seed).standard_normal((count, width)))


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_exact_search_equals_sorting(count: int, k: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = (
        rng.standard_normal((count, 4)).astype(np.float32),
        rng.standard_normal((3, 4)).astype(np.float32),
    )
    rows = np.arange(count) + 7
    cut = [(rows[start : start + block], vectors[start : start + block]) for start in range(0, count, block)]
    expected = -np.sort(-(queries @ vectors.T), axis=1)[:, :k]
    scores, found = exact_search(queries, cut, k)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(queries @ vectors.T, found - 7, axis=1), expected, atol=1e-5)


@given(st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_recall_is_fraction_of_true_neighbors(count: int, seed: int, is_own: bool) -> None:
    vectors, rows = unit(count, 4, seed), np.arange(count) + 3
    own = rows[:6] if is_own else None
    queries = vectors[:6] if is_own else unit(6, 4, seed + 100)
    query_set = make_query_set(queries, [(rows, vectors)], own=own)
    index = make_index("Flat", 4)
    index.add(rows, vectors)
    found = query_set.search(index, {})
    assert query_set.recall(found, query_set.k) == 1
    if own is not None:
        assert not (found == own[:, None]).any()
    found[:, 0] = -1
    assert query_set.recall(found, query_set.k) == pytest.approx(1 - 1 / query_set.k)
    assert query_set.recall(found, 1) == 0


def test_recall_counts_ties() -> None:
    vectors = np.repeat(unit(2, 4, 0), 30, axis=0)
    query_set = make_query_set(vectors[:1], [(np.arange(60), vectors)], own=None)
    assert query_set.recall(np.arange(15, 25)[None], 10) == 1
    assert query_set.recall(np.arange(25, 35)[None], 10) == 0.5


def test_drop_own() -> None:
    rows = np.array([[4, 7, 9], [1, 2, 3]])
    assert drop_own(rows, np.array([7, 7])).tolist() == [[4, 9], [1, 2]]


def test_parameter_choices_ascend() -> None:
    index = make_index("IVF6,Flat", 4)
    assert [effort["nprobe"] for effort in parameter_choices(index)] == [1, 2, 4, 6]
    assert parameter_choices(make_index("Flat", 4)) == [{}]
    assert [effort["efSearch"] for effort in parameter_choices(make_index("HNSW8", 4))] == [
        16,
        32,
        64,
        128,
        256,
        512,
        1024,
    ]
    refined = make_index("IVF2,RaBitQ,Refine(SQ8)", 4)
    assert parameter_choices(refined)[0] == {"nprobe": 1, "k_factor": 4}
    assert parameter_choices(refined)[-1] == {"nprobe": 2, "k_factor": 64}
