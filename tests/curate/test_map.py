"""The map of an index: every item once, clusters that are named by what distinguishes them, and its file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.curate import map as map_module
from embedcache.curate.map import (
    FILE,
    build_map,
    compute_map,
    name_clusters,
    read_map,
    write_map,
)
from embedcache.curate.settings import MapSettings
from embedcache.maintain.remove import remove_samples
from embedcache.provenance import to_metadata
from embedcache.search.concepts import Concepts
from embedcache.search.index import build_index
from embedcache.search.search import Hit, OpenIndex
from embedcache.search.settings import IndexSettings

PCA = MapSettings(projection="pca")


@pytest.fixture(scope="module")
def index(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenIndex:
    path = tmp_path_factory.mktemp("map") / "index"
    build_index(cache_path, path, IndexSettings(feature="open_toy/cls"))
    return OpenIndex(path)


def hit(caption: str) -> Hit:
    return Hit(score=0.0, row=0, key="", captions=[caption] if caption else [])


def test_map_holds_every_item_and_is_stored(index: OpenIndex) -> None:
    built = build_map(index.path, PCA)
    np.testing.assert_array_equal(built.rows, np.sort(index.rows))
    assert ((built.points >= 0) & (built.points <= 1)).all()
    assert (built.points.min(axis=0) == 0).all()
    assert (built.points.max(axis=0) == 1).all()
    sizes = [cluster.size for cluster in built.clusters]
    assert len(sizes) == 8  # half the square root of 300
    assert sizes == np.bincount(built.clusters_N).tolist() == sorted(sizes, reverse=True)
    captions = index.cache.items("text")["text"].to_pylist()
    for number, cluster in enumerate(built.clusters):
        assert (built.clusters_N[np.searchsorted(built.rows, cluster.nearest)] == number).all()
        median = np.median(built.points[built.clusters_N == number], axis=0)
        assert (cluster.x, cluster.y) == pytest.approx(tuple(median))
        assert cluster.question in {captions[row] for row in cluster.nearest[:8]}
    read = read_map(index)
    assert read is not None
    np.testing.assert_array_equal(read.points, built.points)
    np.testing.assert_array_equal(read.clusters_N, built.clusters_N)
    assert (read.clusters, read.projection, read.seed) == (built.clusters, "pca", 0)


def test_items_removed_since_are_not_on_the_map(index: OpenIndex, cache_path: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_path, tmp_path / "cache"))
    path = Path(shutil.copytree(index.path, tmp_path / "index", ignore=shutil.ignore_patterns("map.parquet")))
    build_map(path, PCA, cache=cache)
    assert read_map(OpenIndex(path, cache=cache)) is not None
    remove_samples(cache, ["00000", "00042"])
    opened = OpenIndex(path, cache=cache)
    assert read_map(opened) is None
    expected = np.setdiff1d(np.arange(300), [0, 42]).tolist()
    assert build_map(path, PCA, cache=cache).rows.tolist() == np.sort(opened.rows).tolist() == expected


def test_sample_takes_each_cluster_in_turn(index: OpenIndex) -> None:
    built = compute_map(index, PCA)
    rows = built.sample(20)
    clusters = built.clusters_N[np.searchsorted(built.rows, rows)]
    assert len(set(rows.tolist())) == 20
    assert clusters[:16].tolist() == [*range(8), *range(8)]
    assert len(built.sample(1000)) == 300


def test_large_index_is_sampled(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_module, "_MAX_FITTED", 50)
    built = compute_map(index, MapSettings(projection="pca", max_items=120))
    assert len(built.rows) == 120
    assert (np.diff(built.rows) > 0).all()
    assert len(built.clusters) == 5


@pytest.mark.parametrize("num", [1, 3, 4])
def test_few_items(num: int, monkeypatch: pytest.MonkeyPatch, index: OpenIndex) -> None:
    monkeypatch.setattr(OpenIndex, "rows", np.arange(num))
    built = compute_map(index, PCA)
    assert len(built.points) == num
    assert (built.points == 0.5).all() == (num < 4)
    assert [cluster.size for cluster in built.clusters] == [num]


def test_plane_of_the_largest_variance() -> None:
    """Check a PCA against a singular value decomposition, and that one dimension has a second of zeros."""
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32) + 3
    centered = vectors - vectors.mean(axis=0)
    expected = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    found = map_module._fit(vectors, "pca", seed=0)(vectors)
    np.testing.assert_allclose(found * np.sign(found[0] * expected[0]), expected, atol=1e-4)
    dots = np.arange(4, dtype=np.float32)[:, None]
    line = map_module._fit(dots, "pca", seed=0)(dots)
    np.testing.assert_allclose(np.abs(line), [[1.5, 0], [0.5, 0], [0.5, 0], [1.5, 0]], atol=1e-5)


def test_clusters_are_named_by_the_concept_of_a_third_of_their_items() -> None:
    concepts = Concepts(names=["x", "y", "z"], vectors=np.eye(3, dtype=np.float32), counts=np.ones(3, int), source={})
    concepts_N = np.array([1, -1, -1, 0, -1, -1, -1, 2, 2, 0, 0, -1, -1, -1])
    clusters_N = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3])
    assert map_module._name_by_concepts(concepts, concepts_N, clusters_N) == ["y", "", "x", ""]


def test_clusters_without_items_of_a_concept_have_no_name(clear: Path, tmp_path: Path) -> None:
    """Check that only the cluster of the zebras has a name, though some concept is the nearest to each."""
    build_index(clear / "cache", tmp_path / "index", IndexSettings(modality="text"))
    settings = MapSettings(projection="pca", concepts=clear / "concepts")
    clusters = compute_map(OpenIndex(tmp_path / "index"), settings).clusters
    names = {cluster.name: cluster for cluster in clusters if cluster.name}
    assert len(clusters) > 4
    assert set(names) <= {"zebra", "yak"}
    assert min(names["zebra"].nearest) < 50


def test_names_are_the_words_that_distinguish() -> None:
    """Check fractions of captions, and that a second word is named from 0.6 of the weight of the first."""
    dogs = [hit("a dog on the grass"), hit("the dog")]
    labeled = Hit(score=0.0, row=0, key="", captions=[], label="bird")
    for clusters, names in (
        ([dogs, [hit("a cat on the sofa"), hit("the cat")]], ["dog", "cat"]),
        ([[hit("")], dogs], ["group 1", "dog"]),
        ([[hit("bird rock"), hit("bird"), hit("lake")], [hit("bird tree")]], ["lake, rock", "tree"]),
        ([[hit("red dog"), hit("red dog"), hit("dog")], [hit("cat")]], ["dog, red", "cat"]),
        ([[hit("red dog"), *[hit("dog")] * 3], [hit("cat")]], ["dog", "cat"]),
        ([[labeled], [hit("Cat, CAT!")]], ["bird", "cat"]),
        ([[hit("There is his dog")], [hit("a cat")]], ["dog", "cat"]),
    ):
        assert name_clusters(clusters) == names


def test_questions_are_the_shortest_captions_of_the_nearest() -> None:
    assert map_module._question([hit("a cat on a mat"), hit(" a dog "), hit("x" * 81)]) == "a dog"
    assert map_module._question([hit("x" * 81), hit("a\nb"), hit("")]) == ""
    assert map_module._question([hit("x" * 80)]) == "x" * 80
    assert map_module._question([*[hit("long enough")] * 8, hit("short")]) == "long enough"


def test_clusters_are_numbered_by_size() -> None:
    assert map_module._largest_first(np.array([3, 1, 1, 3, 0, 1]), 5).tolist() == [1, 0, 0, 1, 2, 0]
    inside = np.array([0, 2, 3])
    rows, cosines = np.array([5, 6, 7, 8]), np.array([0.1, 0.9, 0.3, 0.3])
    assert map_module._nearest(rows, cosines, inside).tolist() == [7, 8, 5]
    assert len(map_module._nearest(np.arange(30), np.zeros(30), np.arange(30))) == 24


def test_placed_items_are_weighted_means_of_five_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    fitted = rng.standard_normal((9, 4)).astype(np.float32)
    fitted /= np.linalg.norm(fitted, axis=1, keepdims=True)
    monkeypatch.setattr(map_module, "_run_umap", lambda vectors, **_: vectors[:, :2].copy())
    other = np.array([[0.6, 0, 0.8, 0]], np.float32)
    cosines = fitted @ other[0]
    near = np.argsort(-cosines)[:5]
    weights = 1 / (1e-4 + np.maximum(1 - cosines[near], 0)) ** 2
    expected = (weights[:, None] * fitted[near, :2]).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(map_module._fit(fitted, "umap", seed=0)(other)[0], expected, rtol=1e-4)
    assert map_module._fit(fitted[:3], "umap", seed=0)(other).tolist() == [[0, 0]]


def test_projection_is_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_umap, count, expected in ((True, 16, "umap"), (True, 15, "pca"), (False, 16, "pca")):
        monkeypatch.setattr(map_module, "is_installed", lambda _, found=has_umap: found)
        assert map_module._choose_projection(None, count) == expected
    assert map_module._choose_projection("pca", 16) == "pca"


def test_maps_that_name_what_does_not_exist_are_invalid(index: OpenIndex) -> None:
    built = compute_map(index, PCA)
    assert map_module._is_valid(built, index)
    outside, unsorted, number = built.points.copy(), built.rows.copy(), built.clusters_N.copy()
    outside[0, 0], unsorted[:2], number[0] = 1.01, unsorted[1], 8
    first, last, low = built.rows.copy(), built.rows.copy(), built.points.copy()
    first[0], last[-1], low[3, 1] = -1, 300, -0.01
    for changed in (
        {"points": outside},
        {"points": low},
        {"rows": unsorted},
        {"rows": first},
        {"rows": last},
        {"rows": built.rows[:0]},
        {"clusters_N": number},
        {"clusters_N": built.clusters_N - 1},
        {"clusters": [replace(built.clusters[0], nearest=[300]), *built.clusters[1:]]},
        {"clusters": [replace(built.clusters[0], nearest=[-1]), *built.clusters[1:]]},
    ):
        assert not map_module._is_valid(replace(built, **changed), index), changed.keys()  # type: ignore[arg-type]
    assert map_module._is_valid(replace(built, clusters=[replace(built.clusters[0], nearest=[0, 299])] * 8), index)


def test_other_or_damaged_map_counts_as_absent(index: OpenIndex, tmp_path: Path) -> None:
    write_map(index, compute_map(index, PCA))
    path = index.path / FILE
    valid = path.read_bytes()
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"embedcache"])
    nowhere = {**header, "clusters": [{**cluster, "nearest": [10**6]} for cluster in header["clusters"]]}
    for changed in ({**header, "format": 2}, {**header, "num_vectors": 299}, {**header, "clusters": []}, nowhere):
        pq.write_table(table.replace_schema_metadata(to_metadata(changed)), path)
        assert read_map(index) is None
    name = header["clusters"][0]["name"].encode()
    for position in (1000, valid.rindex(b'"name": "' + name) + 9):  # a page, and a name in the footer
        damaged = bytearray(valid)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert read_map(index) is None
    path.write_bytes(valid)
    assert read_map(index) is not None
    shutil.copy(path, tmp_path / FILE)
    path.unlink()
    assert read_map(index) is None
