"""An index of rows by itself: sizes, defaults and reading."""

import numpy as np
import pytest

from embedcache.arrays import Floats, normalize
from embedcache.errors import SettingError
from embedcache.search.faiss_index import RowIndex, check_factory, make_index

VECTORS = normalize(np.random.default_rng(0).standard_normal((400, 16)))
ROWS = 2 * np.arange(400) + 5


def filled(factory: str, vectors_NP: Floats = VECTORS) -> RowIndex:
    index = make_index(factory, 16, device="cpu")
    if not index.is_trained:
        index.train(vectors_NP)
    index.add(ROWS[: len(vectors_NP)], vectors_NP)
    return index


def test_numbers_of_training_vectors() -> None:
    for factory, expected in (
        *(("Flat", 0), ("HNSW8", 0), ("SQ8", 20_000)),
        *(("IVF400,Flat", 20_000), ("IVF401,SQ8", 20_050)),
    ):
        assert make_index(factory, 16).num_training == expected


def test_search_is_the_fastest_unless_told_otherwise() -> None:
    index = filled("IVF8,Flat")
    fastest = {"nprobe": 1}
    rows = index.search(VECTORS[:100], 5, fastest)[1]
    for parameters in (None, {}, {"efSearch": 9}):
        np.testing.assert_array_equal(index.search(VECTORS[:100], 5, parameters)[1], rows)
    assert (index.search(VECTORS[:100], 5, {"nprobe": 2})[1] != rows).any()


def test_graph_searches_with_the_effort_of_its_kind() -> None:
    index = filled("HNSW2")
    found = [index.search(VECTORS[:100], 5, parameters)[1] for parameters in (None, {"efSearch": 16}, {"efSearch": 1})]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_empty_index_finds_and_reads_nothing() -> None:
    index = make_index("Flat", 16)
    assert index.read(np.array([0])) is None
    scores, rows = index.search(VECTORS[:2], 3)
    assert (scores.shape, rows.tolist()) == ((2, 3), [[-1] * 3] * 2)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_vectors_are_read_in_the_order_asked_for(factory: str) -> None:
    index = filled(factory)
    rows = np.array([803, 5, 5, 7])
    np.testing.assert_array_equal(index.read(rows), VECTORS[[399, 0, 0, 1]])
    for missing in (3, 6, 804, 900):
        assert index.read(np.array([5, missing])) is None


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "SQ8", "IVF4,SQ8", "IVF4,PQ4x4"])
def test_reset_index_keeps_its_training(factory: str) -> None:
    index = filled(factory)
    parameters = {"nprobe": 4, "efSearch": 400}
    expected = index.search(VECTORS[:20], 5, parameters)
    index.reset()
    assert (len(index), index.rows.tolist(), index.is_trained) == (0, [], True)
    index.add(ROWS, VECTORS)
    assert index.rows.tolist() == ROWS.tolist()
    scores, rows = index.search(VECTORS[:20], 5, parameters)
    np.testing.assert_allclose(scores, expected[0], rtol=1e-6)  # graphs sum in the order in which they are walked
    np.testing.assert_array_equal(rows, expected[1])


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        *((factory, "expected HNSWm") for factory in ("HNSW0", "HNSW1", "HNSW9999", "NSG16", "PCA8,Flat", "PQ4x4")),
        *((factory, "expected HNSWm") for factory in ("IVF4,RaBitQ", "IVF4,PQ4x4fs", "IVF4_HNSW0,Flat", "SQ8,RFlat")),
        *((factory, "expected 1 to 400 lists") for factory in ("IVF0,Flat", "IVF401,SQ8")),
    ],
)
def test_other_factories_are_refused(factory: str, words: str) -> None:
    with pytest.raises(SettingError, match=f"factory: {words}"):
        check_factory(factory, 400)


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW32", "IVF400,Flat", "IVF1,PQ8", "IVF4_HNSW32,SQfp16"])
def test_accepted_factories(factory: str) -> None:
    check_factory(factory, 400)
