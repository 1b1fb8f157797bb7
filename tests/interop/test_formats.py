"""Vectors by the name of their format, as a notebook exports and imports them."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import SettingError, UnknownNameError
from embedcache.interop.formats import export_vectors, open_vectors
from embedcache.interop.importing import import_vectors
from embedcache.interop.settings import VectorExportSettings
from embedcache.store.cache import Cache
from tests.recorded import RecordedProgress


def test_exported_vectors_are_imported(labeled: Path, tmp_path: Path) -> None:
    cache, rows, arrays = Cache(labeled), tmp_path / "rows.parquet", tmp_path / "arrays"
    report = export_vectors("parquet", cache, str(rows), modality="image")
    feature = cache.feature("image")
    expected = feature.gather(np.flatnonzero(feature.valid))
    assert report.line() == f"{rows}: {len(expected)} rows; left out: {report.left_out}"
    progress, images = RecordedProgress(), VectorExportSettings(modality="image")
    assert export_vectors("npy", cache, arrays, images, progress=progress).num_rows == len(expected)
    assert progress.started == [
        ("writing rows.parquet", len(expected), "rows"),
        ("writing image.npy", len(expected), "vectors"),
    ]
    assert progress.counts == {what: total for what, total, _ in progress.started}
    opened = {
        "parquet": open_vectors("parquet", str(rows), vector_columns={"image": "image_vector"}),
        "npy": open_vectors("npy", files={"image": str(arrays / "image.npy")}, table=arrays / "rows.parquet"),
    }
    for name, vectors in opened.items():
        (imported,) = import_vectors(vectors, tmp_path / name, model="toy", key_column="key")
        assert imported.imported == len(expected)
        np.testing.assert_array_equal(Cache(tmp_path / name).feature("image").load(), expected)


def test_wrong_requests_raise(labeled: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown import format 'parket'; did you mean 'parquet'"):
        open_vectors("parket", "x")
    with pytest.raises(
        UnknownNameError, match=r"unknown argument 'path' of the import format npy; known: files, table"
    ):
        open_vectors("npy", "x.npy")
    for wrong in ("x.npy", ["x.npy"], {"audio": 3}):
        with pytest.raises(SettingError, match=r"files: expected modality -> name, such as {'audio': 'clap'}, got "):
            open_vectors("npy", files=wrong)
    with pytest.raises(SettingError, match=r"expected one .npy file of audio vectors, got \['x', 'y'\]; name one"):
        open_vectors("npy", files={"audio": ["x", "y"]})
    with pytest.raises(SettingError, match=r"path: expected a folder or file of the format datacomp, got none"):
        open_vectors("datacomp")
    with pytest.raises(UnknownNameError, match=r"unknown export format 'csv'; .*parquet"):
        export_vectors("csv", labeled, tmp_path / "x")
    with pytest.raises(UnknownNameError, match=r"unknown setting 'projection'"):
        export_vectors("npy", labeled, tmp_path / "x", projection="pca")
    with pytest.raises(SettingError, match=r"modality: expected image or text for this format, got audio"):
        export_vectors("clip-retrieval", labeled, tmp_path / "x", modality="audio")
