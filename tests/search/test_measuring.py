import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, normalize
from embedcache.search.autotune import efforts, make_query_set, without
from embedcache.search.faiss_index import exact_search, make_index


def unit(count: int, width: int, seed: int) -> Floats:
    return normalize(np.random.default_rng(seed).standard_normal((count, width)))


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_exact_search_agrees_with_sorting_everything(count: int, k: int, block: int, seed: int) -> None:
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
def test_recall_is_the_share_of_the_true_ones(count: int, seed: int, is_own: bool) -> None:
    vectors, rows = unit(count, 4, seed), np.arange(count) + 3
    own = rows[:6] if is_own else None
    queries = vectors[:6] if is_own else unit(6, 4, seed + 100)
    questions = make_query_set(queries, [(rows, vectors)], own=own)
    index = make_index("Flat", 4)
    index.add(rows, vectors)
    found = questions.ask(index, {})
    assert questions.recall(found, questions.k) == 1
    if own is not None:
        assert not (found == own[:, None]).any()
    found[:, 0] = -1
    assert questions.recall(found, questions.k) == pytest.approx(1 - 1 / questions.k)
    assert questions.recall(found, 1) == 0


def test_any_of_equal_vectors_counts_as_found() -> None:
    vectors = np.repeat(unit(2, 4, 0), 30, axis=0)
    questions = make_query_set(vectors[:1], [(np.arange(60), vectors)], own=None)
    assert questions.recall(np.arange(15, 25)[None], 10) == 1
    assert questions.recall(np.arange(25, 35)[None], 10) == 0.5


def test_a_querys_own_row_is_left_out_and_the_last_where_it_was_not_found() -> None:
    rows = np.array([[4, 7, 9], [1, 2, 3]])
    assert without(rows, np.array([7, 7])).tolist() == [[4, 9], [1, 2]]


def test_efforts_go_from_quick_to_thorough() -> None:
    index = make_index("IVF6,Flat", 4)
    assert [effort["nprobe"] for effort in efforts(index)] == [1, 2, 4, 6]
    assert efforts(make_index("Flat", 4)) == [{}]
    assert [effort["efSearch"] for effort in efforts(make_index("HNSW8", 4))] == [16, 32, 64, 128, 256, 512, 1024]
    refined = make_index("IVF2,RaBitQ,Refine(SQ8)", 4)
    assert efforts(refined)[0] == {"nprobe": 1, "k_factor": 4}
    assert efforts(refined)[-1] == {"nprobe": 2, "k_factor": 64}
