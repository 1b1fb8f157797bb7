"""Vectors as lists in Parquet, of ours and of others."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import DataError, EmbedcacheError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.files import open_path
from embedcache.sources import open_source
from embedcache.vectors import exporting
from embedcache.vectors.exporting import export_vectors
from embedcache.vectors.opening import open_vectors
from tests.images import write_images
from tests.toy import IMAGE
from tests.vectors.cases import import_files, unit_rows


def write(path: Path, lists: pa.Array, *, row_group_size: int | None = None) -> Path:
    table = pa.table({"id": [f"{row}" for row in range(len(lists))], "emb": lists, "other": [1] * len(lists)})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def lists_of(vectors: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return pa.array([None if vector is None else list(vector) for vector in vectors], kind)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.list_(pa.float32()), np.float32),
        (pa.large_list(pa.float32()), np.float32),
        (pa.list_(pa.float16(), 8), np.float16),
        (pa.list_(pa.float32(), 8), np.float32),
    ],
)
@pytest.mark.parametrize("row_group_size", [7, 100])
def test_list_types(tmp_path: Path, kind: pa.DataType, dtype: type, row_group_size: int) -> None:
    if pa.types.is_fixed_size_list(kind) and int(pa.__version__.partition(".")[0]) < 26:
        pytest.skip("Arrow before 26 cannot read a null of this type")
    vectors = unit_rows(30).astype(dtype)
    path = write(tmp_path / "x.parquet", lists_of([*vectors[:-1], None], kind), row_group_size=row_group_size)
    vectors_in = open_vectors("parquet", path, vector_columns={"image": "emb"})
    cache, _ = import_files(vectors_in, tmp_path / "cache")
    found = cache.feature("image", "emb")
    np.testing.assert_array_equal(found.load()[:-1], vectors[:-1], strict=True)
    assert found.failures == {29: "NaN or infinity in the imported vector"}
    assert cache.samples["key"].to_pylist() == [f"{row}" for row in range(30)]


def test_folder_of_files(tmp_path: Path) -> None:
    vectors = unit_rows(20).astype(np.float32)
    (tmp_path / "files").mkdir()
    for number, rows in enumerate((slice(0, 12), slice(12, 20))):
        table = pa.table({"emb": lists_of(vectors[rows], pa.list_(pa.float32()))})
        pq.write_table(table, tmp_path / "files" / f"{number}.parquet")
    cache, _ = import_files(
        open_vectors("parquet", tmp_path / "files", vector_columns={"image": "emb"}), tmp_path / "cache"
    )
    np.testing.assert_array_equal(cache.feature("image").load(), vectors)
    assert cache.samples["key"][19].as_py() == "000000019"


def test_columns_of_vectors_have_no_other_role(tmp_path: Path) -> None:
    """Vectors in columns named as those of images and captions usually are."""
    lists = lists_of(unit_rows(3), pa.list_(pa.float16()))
    pq.write_table(pa.table({"image": lists, "text": lists, "sentence": ["a", "b", "c"]}), tmp_path / "rows.parquet")
    opened = open_vectors("parquet", tmp_path / "rows.parquet", vector_columns={"image": "image", "text": "text"})
    cache, _ = import_files(opened, tmp_path / "cache")
    assert cache.items("text")["text"].to_pylist() == ["a", "b", "c"]
    assert [feature.name for feature in cache.features()] == ["image/vector", "text/vector"]


@pytest.mark.parametrize(
    ("lists", "columns", "error", "word"),
    [
        ([[1, 2]] * 3, {}, SettingError, "emb"),
        ([[1, 2]] * 3, {"image": "vec"}, UnknownNameError, "emb"),
        ([[1, 2]] * 3, {"image": "other"}, DataError, "int64"),
        ([[1, 2]] * 3, {"image": "emb", "text": "emb"}, SettingError, "once"),
        ([None] * 3, {"image": "emb"}, DataError, "none in 3 rows"),
        ([[1, 2], [1, 2], [1, 2, 3]], {"image": "emb"}, DataError, "row 2"),
    ],
)
def test_columns_without_vectors_raise(
    tmp_path: Path, lists: list[object], columns: dict[str, str], error: type[EmbedcacheError], word: str
) -> None:
    path = write(tmp_path / "x.parquet", lists_of(lists, pa.list_(pa.float32())))
    with pytest.raises(error, match=word):
        import_files(open_vectors("parquet", path, vector_columns=columns), tmp_path / "cache")


def test_languages_that_begin_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "photos", 6)
    (folder / "00001.txt").unlink()
    (folder / "00005.txt").unlink()
    (folder / "00005.json").write_text('{"caption": "ein roter Balken", "language": "de"}')
    extract(open_source(folder), tmp_path / "cache", image_encoder=[IMAGE])
    monkeypatch.setattr(exporting, "_BLOCK", 2)
    export_vectors("parquet", tmp_path / "cache", tmp_path / "rows.parquet", feature="open_toy/cls")
    written = pq.read_table(tmp_path / "rows.parquet")
    assert written["language"].to_pylist() == [None] * 5 + ["de"]
    captions = [(folder / f"{row:05d}.txt").read_text().strip() for row in (0, 2, 3, 4)]
    assert written["caption"].to_pylist() == [captions[0], None, *captions[1:], "ein roter Balken"]


def test_flipped_vector_of_an_export_is_noticed(labeled: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    export_vectors("parquet", labeled, path, modality="image")
    group = pq.read_metadata(path).row_group(0)
    [column] = [group.column(i) for i in range(group.num_columns) if "image_vector" in group.column(i).path_in_schema]
    start, data = column.dictionary_page_offset or column.data_page_offset, path.read_bytes()
    place = start + column.total_compressed_size // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(EmbedcacheError, match="x.parquet"):
        import_files(open_vectors("parquet", path), tmp_path / "cache")


def test_image_paths_of_files_are_absolute_and_those_of_urls_unchanged(tmp_path: Path) -> None:
    folder, url = write_images(tmp_path / "images", 2), "memory://photos/00001.png"
    open_path(url).parent.mkdir(parents=True, exist_ok=True)
    open_path(url).write_bytes((folder / "00001.png").read_bytes())
    (tmp_path / "rows.csv").write_text(f"image,caption\nimages/00000.png,a\n{url},b\n")
    coco = {"images": [{"id": 0, "file_name": "00000.png"}, {"id": 1, "file_name": "00001.png"}], "annotations": []}
    (tmp_path / "captions_images.json").write_text(json.dumps(coco))
    files = [str(folder / f"0000{number}.png") for number in range(2)]
    for location, expected in (
        (f"{folder}", files),
        (f"{tmp_path / 'captions_images.json'}", files),
        (f"{tmp_path / 'rows.csv'}", [files[0], url]),
    ):
        cache = tmp_path / location.replace("/", "-")
        extract(open_source(location), cache, image_encoder=[IMAGE])
        export_vectors("parquet", cache, f"{cache}.parquet", modality="image")
        assert pq.read_table(f"{cache}.parquet")["image_path"].to_pylist() == expected
