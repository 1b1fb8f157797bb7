"""The map of an index: every item once, clusters that are named by what distinguishes them, and its file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.curate import map as map_module
from embedcache.curate.map import FILE, build_map, compute_map, name_clusters, project_to_plane, read_map, write_map
from embedcache.curate.settings import MapSettings
from embedcache.search.hits import Hit
from embedcache.search.index import build_index
from embedcache.search.search import OpenIndex
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
    for number, cluster in enumerate(built.clusters):
        assert (built.clusters_N[np.searchsorted(built.rows, cluster.nearest)] == number).all()
    read = read_map(index)
    assert read is not None
    np.testing.assert_array_equal(read.points, built.points)
    np.testing.assert_array_equal(read.clusters_N, built.clusters_N)
    assert (read.clusters, read.projection, read.seed) == (built.clusters, "pca", 0)


def test_points_are_principal_components(index: OpenIndex) -> None:
    """Fitted to a sample of all items, the positions are those of a PCA, up to the unit square."""
    built = compute_map(index, PCA)
    vectors = index.query_encoder.indexed.read(built.rows).astype(np.float64)
    _, _, directions = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    expected = vectors @ directions[:2].T
    correlations = [abs(np.corrcoef(expected[:, axis], built.points[:, axis])[0, 1]) for axis in (0, 1)]
    np.testing.assert_allclose(correlations, 1, atol=1e-4)


def test_sample_takes_each_cluster_in_turn(index: OpenIndex) -> None:
    built = compute_map(index, PCA)
    rows = built.sample(20)
    clusters = built.clusters_N[np.searchsorted(built.rows, rows)]
    assert len(set(rows.tolist())) == 20
    assert sorted(clusters[:8]) == list(range(8))
    assert len(built.sample(1000)) == 300


def test_large_index_is_sampled(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_module, "_MAX_FITTED", 50)
    built = compute_map(index, MapSettings(projection="pca", max_items=120))
    assert len(built.rows) == 120
    assert (np.diff(built.rows) > 0).all()
    assert len(built.clusters) == 5


def test_umap_places_others_between_neighbors(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of the fitted sample stay where UMAP puts them; an equal vector lies there too."""
    monkeypatch.setattr(map_module, "project_to_plane", lambda vectors, *_, **__: vectors[:, :2].copy())
    fitted = index.query_encoder.indexed.read(np.arange(40))
    place = map_module._fit(fitted, "umap", seed=0)
    np.testing.assert_allclose(place(fitted[:5]), fitted[:5, :2], atol=1e-3)
    between = place(index.query_encoder.indexed.read(np.arange(40, 60)))
    assert (between >= fitted[:, :2].min(axis=0)).all()
    assert (between <= fitted[:, :2].max(axis=0)).all()


@pytest.mark.parametrize("num", [1, 3, 4])
def test_few_items(num: int, monkeypatch: pytest.MonkeyPatch, index: OpenIndex) -> None:
    monkeypatch.setattr(OpenIndex, "rows", np.arange(num))
    built = compute_map(index, PCA)
    assert len(built.points) == num
    assert [cluster.size for cluster in built.clusters] == [num]
    assert len(project_to_plane(np.ones((4, 1), np.float32), "pca", seed=0)[0]) == 2


def test_names_are_what_distinguishes() -> None:
    dogs, cats = [hit("a dog on the grass"), hit("the dog")], [hit("a cat on the sofa"), hit("the cat")]
    assert name_clusters([dogs, cats]) == ["dog", "cat"]
    assert name_clusters([[hit("")], dogs]) == ["group 1", "dog, the"]


def test_other_or_damaged_map_counts_as_absent(index: OpenIndex, tmp_path: Path) -> None:
    write_map(index, compute_map(index, PCA))
    path = index.path / FILE
    valid = path.read_bytes()
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"embedcache"])
    nowhere = {**header, "clusters": [{**cluster, "nearest": [10**6]} for cluster in header["clusters"]]}
    for changed in ({**header, "format": 2}, {**header, "num_vectors": 299}, {**header, "clusters": []}, nowhere):
        pq.write_table(table.replace_schema_metadata({"embedcache": json.dumps(changed)}), path)
        assert read_map(index) is None
    damaged = bytearray(valid)
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    assert read_map(index) is None
    path.write_bytes(valid)
    assert read_map(index) is not None
    shutil.copy(path, tmp_path / FILE)
    path.unlink()
    assert read_map(index) is None
