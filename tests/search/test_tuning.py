"""Indexes of rows, the configurations to choose from, and the search parameters that reach a recall."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Bools, Floats, Ints, normalize
from embedcache.dataset.vectors import Vectors
from embedcache.errors import SettingError
from embedcache.search import index as autotune
from embedcache.search.faiss_index import RowIndex, check_factory, make_index
from embedcache.search.index import (
    Configuration,
    QuerySet,
    draw_query_set,
    drop_own,
    fit_memory,
    in_memory_configurations,
    make_query_set,
    measure_index,
    measure_latency_ms,
    num_lists,
    on_disk_configurations,
    parameter_choices,
    tune_search,
)
from embedcache.vectors.opening import open_vectors
from tests.recorded import RecordedProgress
from tests.vectors.cases import import_files, unit_rows, write_tree

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


def unit(count: int, width: int, seed: int) -> Floats:
    return normalize(np.random.default_rng(seed).standard_normal((count, width)))


@given(st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_recall_is_fraction_of_true_neighbors(count: int, seed: int, is_own: bool) -> None:
    vectors, rows = unit(count, 4, seed), np.arange(count) + 3
    own = rows[:6] if is_own else None
    queries = vectors[:6] if is_own else unit(6, 4, seed + 100)
    query_set = make_query_set(queries, [(rows, vectors)], own=own)
    index = make_index("Flat", 4)
    index.add(rows, vectors)
    found = query_set.search(index, {})
    assert query_set.k == min(10, count - is_own)
    assert found.shape == (len(queries), query_set.k)
    assert query_set.scores.shape == query_set.rows.shape == (len(queries), count - is_own)
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


def test_recall_counts_scores_within_rounding() -> None:
    """Check the edge: 1e-5 below the k-th score is a tie, more is not."""
    scores = np.array([[1, 0, -1e-5, -1.1e-5]], np.float32)
    query_set = QuerySet(vectors=np.zeros((1, 2), np.float32), own=None, scores=scores, rows=np.arange(4)[None])
    assert [query_set.recall(np.array([[row, 9]]), 2) for row in range(4)] == [0.5, 0.5, 0.5, 0]
    assert query_set.recall(np.array([[1, 0]]), 1) == 0


@pytest.mark.parametrize("has_own", [True, False])
def test_halves_are_every_other_query(has_own: bool) -> None:
    own = np.array([5, 6, 7]) if has_own else None
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    query_set = QuerySet(vectors=values, own=own, scores=values + 10, rows=np.arange(6).reshape(3, 2))
    one = query_set.half(1)
    for part, chosen in ((query_set.half(0), [0, 2]), (one, [1]), (one.half(0), [1]), (one.half(1), [1])):
        assert part.vectors.tolist() == values[chosen].tolist()
        assert part.scores.tolist() == (values[chosen] + 10).tolist()
        assert part.rows.tolist() == query_set.rows[chosen].tolist()
        assert (part.own.tolist() if part.own is not None else None) == (own[chosen].tolist() if has_own else None)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    """2,100 vectors of width 8 in three chunks."""
    folder = tmp_path_factory.mktemp("many")
    tree = write_tree(folder / "tree", unit_rows(2100), rows_per_file=2100)
    cache, _ = import_files(open_vectors("clip-retrieval", tree), folder / "cache", chunk_size=800)
    return Vectors(cache.path, "image")


@pytest.mark.slow
def test_two_thousand_queries_are_drawn(many: Vectors) -> None:
    progress = RecordedProgress()
    query_set = draw_query_set(many, progress)
    own = np.random.default_rng(1).permutation(2100)[:2000]
    assert query_set.own is not None
    np.testing.assert_array_equal(query_set.own, own)
    np.testing.assert_array_equal(query_set.vectors, many.read(own))
    assert query_set.k == 10
    assert query_set.scores.shape == query_set.rows.shape == (2000, 99)  # of 100, without the query itself


@pytest.mark.slow
def test_queries_of_the_other_modality_are_no_neighbors_of_their_own(cache_path: Path, run_path: Path) -> None:
    for modality, other in (("image", "text"), ("text", "image")):
        query_set = draw_query_set(Vectors(cache_path, modality, run_path=run_path), RecordedProgress())
        assert query_set.own is None
        rows = np.random.default_rng(1).permutation(300)
        expected = Vectors(cache_path, other, run_path=run_path).read(rows)
        np.testing.assert_array_equal(query_set.vectors, expected)


def test_parameter_choices_ascend() -> None:
    index = make_index("IVF6,Flat", 4)
    assert parameter_choices(index) == [{"nprobe": nprobe} for nprobe in (1, 2, 4, 6)]
    assert parameter_choices(make_index("Flat", 4)) == [{}]
    efforts = [{"efSearch": ef} for ef in (16, 32, 64, 128, 256, 512, 1024)]
    assert parameter_choices(make_index("HNSW8", 4)) == efforts


class ScriptedIndex(RowIndex):
    """An index of which each search finds as many of the true neighbors as planned, the first queries' first."""

    def __init__(self, factory: str, num_found: Sequence[int]) -> None:
        super().__init__(make_index(factory, 2).index, device="cpu")
        self.num_found = num_found
        self.searches: list[Mapping[str, int]] = []
        self.queries: list[list[float]] = []

    def search(
        self,
        queries_QP: Floats,
        k: int,
        parameters: Mapping[str, int] | None = None,
        *,
        is_allowed_N: Bools | None = None,
    ) -> tuple[Floats, Ints]:
        num_found = self.num_found[len(self.searches)]
        self.searches.append(parameters or {})
        self.queries.append(queries_QP[:, 0].tolist())
        places = np.arange(len(queries_QP) * k).reshape(-1, k)
        return np.zeros(places.shape, np.float32), np.where(places < num_found, np.arange(k), -1)


def ten_neighbors(num_queries: int) -> QuerySet:
    """Return queries whose true neighbors are the rows from 0 to 9."""
    numbers = np.stack([np.arange(num_queries), np.ones(num_queries)], axis=1).astype(np.float32)
    scores, rows = (np.tile(values, (num_queries, 1)) for values in (np.arange(10.0, 0, -1), np.arange(10)))
    return QuerySet(vectors=numbers, own=None, scores=scores.astype(np.float32), rows=rows)


@pytest.mark.parametrize(
    ("factory", "per_mille", "num_searches", "chosen"),
    [
        ("IVF64,Flat", [400, 699, 700, 800], 3, 2),  # reached exactly
        ("IVF64,Flat", [100, 200, 300, 400, 500, 600, 650], 7, 6),  # never reached
        ("IVF64,Flat", [600, 601, 601, 900], 3, 1),  # two doublings found nothing more
        ("IVF64,Flat", [600, 603, 603, 603, 900], 4, 1),
        ("IVF64,Flat", [600, 601, 603, 603, 603, 900], 5, 2),
        ("IVF64,Flat", [500, 500, 500, 500, 500, 500, 650], 7, 6),  # flat at a low recall
        ("IVF64,Flat", [501, 501, 501, 900], 3, 0),
        ("IVF2,Flat", [100, 900], 2, 1),
        ("IVF1,Flat", [], 0, 0),
        ("Flat", [], 0, 0),
    ],
)
def test_fastest_search_that_reaches_the_recall_is_chosen(
    factory: str, per_mille: list[int], num_searches: int, chosen: int
) -> None:
    index = ScriptedIndex(factory, per_mille)
    choices = parameter_choices(index)
    assert tune_search(index, ten_neighbors(100), 0.7) == choices[chosen]
    assert index.searches == choices[:num_searches]


def test_half_of_the_queries_tunes_to_a_little_more_and_the_other_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a target of 0.6 and a quarter of what is missing to 1: 0.7."""
    index = ScriptedIndex("IVF64,Flat", [1370, 1390, 1407, 1311])  # of 2,010
    monkeypatch.setattr(autotune, "measure_latency_ms", lambda _, queries, *how: (len(queries), *how))
    quality = measure_index(index, ten_neighbors(402), 0.6)
    assert index.queries == 3 * [list(range(0, 402, 2))] + [list(range(1, 402, 2))]
    assert quality == {
        "search": {"nprobe": 4},
        "recall_at_1": 132 / 201,
        "recall_at_10": 1311 / 2010,
        "num_queries": 201,
        "latency_ms": (200, 10, {"nprobe": 4}),
    }


def test_latency_is_the_median_of_single_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10, 10.001, 20, 20.006, 30, 30.002])
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    index = make_index("Flat", 8)
    index.add(np.arange(3), unit(3, 8, 0))
    assert measure_latency_ms(index, unit(3, 8, 1), 2, {}) == 2
