"""Vectors by the name of their format, as a notebook exports and imports them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import SettingError, UnknownNameError
from embedcache.store.cache import Cache
from embedcache.vectors.exporting import export_vectors
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import open_vectors
from embedcache.vectors.settings import VectorExportSettings
from tests.recorded import RecordedProgress


def test_exported_vectors_are_imported(labeled: Path, tmp_path: Path) -> None:
    cache, rows, arrays = Cache(labeled), tmp_path / "rows.parquet", tmp_path / "arrays"
    report = export_vectors("parquet", cache, str(rows), modality="image")
    feature = cache.feature("image")
    expected = feature.gather(np.flatnonzero(feature.valid))
    assert report.line() == f"{rows}: {len(expected)} rows; left out: {report.left_out}"
    progress, images = RecordedProgress(), VectorExportSettings(modality="image")
    assert export_vectors("npy", cache, arrays, images, progress=progress).num_rows == len(expected)
    assert progress.started == [("writing", len(expected), "rows")]
    assert progress.counts == {what: total for what, total, _ in progress.started}
    opened = {
        "parquet": open_vectors("parquet", str(rows), vector_columns={"image": "image_vector"}),
        "npy": open_vectors("npy", files={"image": str(arrays / "image.npy")}, table=arrays / "rows.parquet"),
    }
    for name, vectors in opened.items():
        (imported,) = import_vectors(vectors, tmp_path / name, model="toy", key_column="key")
        assert imported.computed == len(expected)
        np.testing.assert_array_equal(Cache(tmp_path / name).feature("image").load(), expected)


@pytest.mark.parametrize(
    ("words", "options", "error", "word"),
    [
        (("parket", "x"), {}, UnknownNameError, "parquet"),
        (("npy",), {"files": {}}, SettingError, "none"),
        (("npy",), {"files": {"sound": "x.npy"}}, UnknownNameError, "audio"),
    ],
)
def test_vectors_that_cannot_be_opened_raise(
    words: tuple[str, ...], options: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        open_vectors(*words, **options)
