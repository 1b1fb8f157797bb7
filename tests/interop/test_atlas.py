"""The Parquet for embedding-atlas, read as its version 0.26 reads it: with pandas, and columns by name."""

import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedcache.arrays import normalize
from embedcache.curate.map import project_to_plane
from embedcache.errors import DataError, MissingExtraError, PathError
from embedcache.extract.extract import extract
from embedcache.interop import atlas
from embedcache.interop.atlas import find_neighbors, write_atlas
from embedcache.interop.settings import AtlasSettings
from embedcache.progress import NullProgress
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.interop.cases import export_of, unit_rows
from tests.toy import IMAGE

NUM_POINTS = 39


def write(cache: Path, path: Path, *, modality: str = "image", images: str = "thumbnails") -> pd.DataFrame:
    settings = AtlasSettings(projection="pca", images=images)  # type: ignore[arg-type]
    write_atlas(export_of(cache, modality=modality), path, settings, progress=NullProgress())
    return pd.read_parquet(path)


def test_columns_that_embedding_atlas_reads(labeled: Path, tmp_path: Path) -> None:
    points = write(labeled, tmp_path / "atlas.parquet")
    assert len(points) == NUM_POINTS
    assert {"key", "text", "image", "vector", "projection_x", "projection_y", "neighbors"} <= set(points.columns)
    assert "float16" not in str(pq.read_schema(tmp_path / "atlas.parquet"))  # DuckDB has none

    ids = np.stack([np.array(row["ids"]) for row in points["neighbors"]])
    distances = np.stack([np.array(row["distances"]) for row in points["neighbors"]])
    assert ids.shape == distances.shape == (NUM_POINTS, 15)
    assert (np.diff(distances, axis=1) >= 0).all()
    vectors = np.stack(points["vector"].tolist())
    np.testing.assert_allclose(1 - (vectors[ids[:, 1]] * vectors).sum(axis=1), distances[:, 1], atol=1e-5)
    assert np.isfinite(points[["projection_x", "projection_y"]].to_numpy()).all()

    cache = Cache(labeled)
    expected = normalize(cache.feature("image").gather(np.flatnonzero(cache.feature("image").valid)))
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    image = Image.open(io.BytesIO(points["image"][0]["bytes"]))
    assert (image.format, image.size) == ("WEBP", (32, 32))
    assert points["text"][0] == cache.items("text")["text"][0].as_py()


def test_columns_of_the_file_replace_those_of_the_cache(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 4)
    lines = [f"images/{path.name},caption {path.stem},x,x,x,x\n" for path in sorted(folder.glob("*.png"))]
    (tmp_path / "table.csv").write_text("".join(["image,caption,text,vector,neighbors,other\n", *lines]))
    extract(open_source(tmp_path / "table.csv"), tmp_path / "cache", image_encoder=[IMAGE])
    points = write(tmp_path / "cache", tmp_path / "atlas.parquet")
    assert points.columns.is_unique
    assert points["text"].tolist() == [f"caption {number:05d}" for number in range(4)]
    assert [len(vector) for vector in points["vector"]] == [48] * 4
    assert points["other"].tolist() == ["x"] * 4


def test_image_paths_or_none(labeled: Path, tmp_path: Path) -> None:
    points = write(labeled, tmp_path / "paths.parquet", images="paths")
    assert all(Path(path).is_file() for path in points["image"])
    assert "image" not in write(labeled, tmp_path / "none.parquet", images="none").columns


def test_missing_image_is_null(labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = labeled.parent / "images" / "00002.png"
    moved = path.rename(tmp_path / "00002.png")
    try:
        points = write(labeled, tmp_path / "atlas.parquet")
    finally:
        moved.rename(path)
    assert [row for row, image in enumerate(points["image"]) if image is None] == [2]


def test_images_of_a_stranger_need_a_folder(labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(PathError, match="name its folder or URL with --image-folder"):
        write_atlas(export_of(labeled, modality="image"), tmp_path / "atlas.parquet", progress=NullProgress())
    assert not (tmp_path / "atlas.parquet").exists()


def test_points_of_captions(labeled: Path, tmp_path: Path) -> None:
    points = write(labeled, tmp_path / "atlas.parquet", modality="text")
    assert len(points) == 40
    assert "image" not in points.columns


def test_existing_file_or_few_points_raise(labeled: Path, tmp_path: Path) -> None:
    (tmp_path / "atlas.parquet").write_text("mine")
    with pytest.raises(PathError, match="is no output of embedcache"):
        write(labeled, tmp_path / "atlas.parquet")
    (tmp_path / "three.txt").write_text("\n".join(f"{row:032x}" for row in range(3)))
    rows = export_of(labeled, modality="image", selection=tmp_path / "three.txt")
    with pytest.raises(DataError, match="points: expected at least 4, got 3"):
        write_atlas(rows, tmp_path / "few.parquet", AtlasSettings(images="none"), progress=NullProgress())
    assert not (tmp_path / "few.parquet").exists()


def test_graph_equals_exact_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = normalize(unit_rows(500, 16))
    rows, distances = find_neighbors(vectors)
    monkeypatch.setattr(atlas, "_MAX_EXACT", 100)
    found, near = find_neighbors(vectors)
    assert (found == rows).mean() > 0.99
    np.testing.assert_allclose(near.mean(), distances.mean(), atol=1e-3)


def test_missing_umap_is_named_before_vectors_are_read(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    export = export_of(labeled, modality="image")
    monkeypatch.setattr(type(export), "vectors", lambda *_: pytest.fail("vectors were read"))
    with pytest.raises(MissingExtraError, match="atlas"):
        write_atlas(export, tmp_path / "atlas.parquet", AtlasSettings(images="none"), progress=NullProgress())


@pytest.mark.slow
def test_umap_keeps_clusters_and_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", True)  # compiling takes longer than so few points
    centers = normalize(unit_rows(3, 16))[np.arange(36) % 3]
    vectors = normalize(centers + 0.1 * unit_rows(36, 16, seed=1))
    points = project_to_plane(vectors, "umap", seed=0)
    np.testing.assert_array_equal(points, project_to_plane(vectors, "umap", seed=0))
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) % 3 == np.arange(36) % 3).mean() > 0.95
