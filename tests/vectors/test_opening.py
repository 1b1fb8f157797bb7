"""Vectors of every format are opened as other tools wrote them, and refused if they are damaged or others."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import Array
from embedcache.curate.select.export import export_selection
from embedcache.dataset.selections import read_selection
from embedcache.errors import CorruptError, DataError, EmbedcacheError, PathError, SettingError, UnknownNameError
from embedcache.store.cache import Cache
from embedcache.vectors.opening import open_npy, open_vectors
from tests.cli.run import succeed
from tests.vectors.cases import import_files, unit_rows, write_tree

GOLDEN = Path(__file__).parents[1] / "golden" / "clip-retrieval-2.45"
UIDS = [f"{row * 0x9E3779B97F4A7C15 % 2**128:032x}" for row in range(1, 21)]


def write_datacomp(folder: Path, *, compressed: bool = False) -> dict[str, Array]:
    """Write two shards as DataComp's index has them; give all rows of each array."""
    folder.mkdir()
    widths = {"b32_img": 8, "l14_img": 12, "l14_txt": 12}
    arrays = {name: unit_rows(20, width, seed=width) for name, width in widths.items()}
    save = np.savez_compressed if compressed else np.savez
    for number, rows in enumerate((slice(0, 12), slice(12, 20))):
        save(folder / f"{number}abc.npz", **{name: array[rows] for name, array in arrays.items()})
        texts = [f"caption {uid[:4]}" for uid in UIDS[rows]]
        scores = [float(row) for row in range(len(texts))]
        table = pa.table({"uid": UIDS[rows], "url": texts, "text": texts, "clip_l14_similarity_score": scores})
        pq.write_table(table, folder / f"{number}abc.parquet")
    return arrays


def lists_of(vectors: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return pa.array([None if vector is None else list(vector) for vector in vectors], kind)


def write_lists(path: Path, lists: pa.Array, *, row_group_size: int | None = None) -> Path:
    table = pa.table({"id": [f"{row}" for row in range(len(lists))], "emb": lists, "other": [1] * len(lists)})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_clip_retrieval_of_version_2_45(tmp_path: Path) -> None:
    opened = open_vectors("clip-retrieval", GOLDEN)
    cache, reports = import_files(opened, tmp_path / "cache", chunk_size=5, model="a random CLIP")
    assert cache.samples["key"].to_pylist() == [f"square-{number:02d}" for number in range(12)]
    assert cache.samples["label"].to_pylist() == [number % 3 for number in range(12)]
    assert cache.items("text")["text"][11].as_py() == "a square, number 11"
    assert cache.items("image")["path"][3].as_py() == "000000003"
    for modality, name in (("image", "img_emb"), ("text", "text_emb")):
        expected = np.concatenate([np.load(file) for file in sorted((GOLDEN / name).glob("*.npy"))])
        np.testing.assert_array_equal(cache.feature(modality, name).load(), expected, strict=True)
    assert [report.computed for report in reports] == [12, 12]
    fingerprint = cache.feature("image").fingerprint
    assert (fingerprint["family"], fingerprint["model"]) == ("imported", "a random CLIP")


def test_row_numbers_are_keys_without_metadata(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", unit_rows(25))
    shutil.rmtree(tree / "metadata")
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    assert cache.samples["key"].to_pylist()[::12] == ["000000000", "000000012", "000000024"]


@pytest.mark.parametrize("compressed", [False, True])
def test_named_arrays_of_datacomp(tmp_path: Path, compressed: bool) -> None:
    arrays = write_datacomp(tmp_path / "index", compressed=compressed)
    named = {"image": ["l14_img", "b32_img"], "text": ["l14_txt"]}
    cache, _ = import_files(open_vectors("datacomp", tmp_path / "index", arrays=named), tmp_path / "cache")
    assert cache.samples["key"].to_pylist() == UIDS
    assert cache.samples["clip_l14_similarity_score"].to_pylist()[12] == 0
    for modality, name in (("image", "l14_img"), ("image", "b32_img"), ("text", "l14_txt")):
        np.testing.assert_array_equal(cache.feature(modality, name).load(), arrays[name], strict=True)


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
def test_list_types_of_parquet(tmp_path: Path, kind: pa.DataType, dtype: type, row_group_size: int) -> None:
    if pa.types.is_fixed_size_list(kind) and int(pa.__version__.partition(".")[0]) < 26:
        pytest.skip("Arrow before 26 cannot read a null of this type")
    vectors = unit_rows(30).astype(dtype)
    path = write_lists(tmp_path / "x.parquet", lists_of([*vectors[:-1], None], kind), row_group_size=row_group_size)
    cache, _ = import_files(open_vectors("parquet", path, vector_columns={"image": "emb"}), tmp_path / "cache")
    feature = cache.feature("image", "emb")
    np.testing.assert_array_equal(feature.load()[:-1], vectors[:-1], strict=True)
    assert feature.failures == {29: "NaN or infinity in the imported vector"}
    assert cache.samples["key"].to_pylist() == [f"{row}" for row in range(30)]


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    """Columns of vectors may have names that columns of images and captions usually have."""
    vectors = unit_rows(20).astype(np.float32)
    (tmp_path / "files").mkdir()
    for number, rows in enumerate((slice(0, 12), slice(12, 20))):
        lists = lists_of(vectors[rows], pa.list_(pa.float32()))
        columns = {"image": lists, "text": lists, "sentence": ["a"] * len(lists)}
        pq.write_table(pa.table(columns), tmp_path / "files" / f"{number}.parquet")
    named = {"image": "image", "text": "text"}
    opened = open_vectors("parquet", tmp_path / "files", vector_columns=named)
    cache, _ = import_files(opened, tmp_path / "cache")
    np.testing.assert_array_equal(cache.feature("image").load(), vectors)
    assert cache.samples["key"][19].as_py() == "000000019"
    assert cache.items("text")["text"].to_pylist() == ["a"] * 20
    assert [feature.name for feature in cache.features()] == ["image/vector", "text/vector"]


L14 = {"arrays": {"image": ["l14_img"]}}
EMB = {"vector_columns": {"image": "emb"}}
Damage = Callable[[Path], object]
WRONG: list[tuple[str, str | None, Damage, dict[str, Any], type[EmbedcacheError], str]] = [
    ("parket", "x", lambda _: None, {}, UnknownNameError, "parquet"),
    ("npy", None, lambda _: None, {"files": {}}, SettingError, "none"),
    ("npy", None, lambda _: None, {"files": {"sound": "x.npy"}}, UnknownNameError, "audio"),
    ("clip-retrieval", "index", lambda _: None, {}, PathError, "img_emb"),
    ("clip-retrieval", "tree", lambda at: (at / "metadata/metadata_1.parquet").unlink(), {}, DataError, "number 1"),
    ("clip-retrieval", "tree", lambda at: np.save(at / "text_emb/text_emb_2", unit_rows(4)), {}, DataError, "has 4"),
    ("clip-retrieval", "tree", lambda at: truncate(at / "img_emb/img_emb_1.npy"), {}, CorruptError, "img_emb_1"),
    ("clip-retrieval", "tree", lambda at: pickled(at / "img_emb/img_emb_0.npy"), {}, CorruptError, "img_emb_0"),
    ("clip-retrieval", "tree", lambda at: save_last(at, np.zeros((5, 8))), {}, DataError, "float64"),
    ("clip-retrieval", "tree", lambda at: save_last(at, np.zeros((5, 8), ">f4")), {}, DataError, ">f4"),
    ("clip-retrieval", "tree", lambda at: save_last(at, np.zeros((5, 8), np.int64)), {}, DataError, "int64"),
    ("clip-retrieval", "tree", lambda at: save_last(at, np.zeros(5, np.float16)), {}, DataError, "shape"),
    ("clip-retrieval", "tree", lambda at: save_last(at, np.zeros((5, 9), np.float16)), {}, DataError, "8 components"),
    ("datacomp", "index", lambda _: None, {"arrays": {}}, SettingError, "none"),
    ("datacomp", "index", lambda _: None, {"arrays": {"image": "a", "text": "a"}}, SettingError, "as image and text"),
    ("datacomp", "index", lambda _: None, {"arrays": {"image": ["g14_img"]}}, UnknownNameError, "b32_img, l14_img"),
    ("datacomp", "index", lambda at: pickled(at / "1abc.npz"), L14, CorruptError, "1abc.npz"),
    ("datacomp", "index", lambda at: (at / "1abc.npz").unlink(), L14, DataError, "npz lacks number 1abc"),
    ("datacomp", "tree", lambda _: None, L14, PathError, "got no .npz file"),
    ("parquet", "index", lambda at: [path.unlink() for path in at.iterdir()], EMB, PathError, "without .parquet"),
    ("parquet", "x.parquet", lambda _: None, {}, SettingError, "emb"),
    ("parquet", "x.parquet", lambda _: None, {"vector_columns": {"image": "vec"}}, UnknownNameError, "emb"),
    ("parquet", "x.parquet", lambda _: None, {"vector_columns": {"image": "other"}}, DataError, "int64"),
    ("parquet", "x.parquet", lambda at: rewrite(at, [None] * 3), EMB, DataError, "none in 3 rows"),
]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def pickled(path: Path) -> None:
    path.write_bytes(b"\x80\x04 pickle")


def save_last(tree: Path, array: Array) -> None:
    np.save(tree / "img_emb" / "img_emb_2.npy", array)


def rewrite(path: Path, vectors: Sequence[object]) -> None:
    write_lists(path, lists_of(vectors, pa.list_(pa.float32())))


@pytest.mark.parametrize(("form", "name", "damage", "options", "error", "word"), WRONG)
def test_wrong_vectors_raise(
    form: str,
    name: str | None,
    damage: Damage,
    options: dict[str, Any],
    error: type[EmbedcacheError],
    word: str,
    tmp_path: Path,
) -> None:
    write_tree(tmp_path / "tree", unit_rows(25), caption=["a"] * 25)
    write_datacomp(tmp_path / "index")
    rewrite(tmp_path / "x.parquet", [[1, 2]] * 3)
    damage(tmp_path / (name or ""))
    with pytest.raises(error, match=word):
        open_vectors(form, None if name is None else tmp_path / name, **options)


def test_wrong_rows_raise(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rewrite(path, [[1, 2], [1, 2], [1, 2, 3]])
    with pytest.raises(DataError, match="row 2"):
        import_files(open_vectors("parquet", path, **EMB), tmp_path / "cache")
    write_datacomp(tmp_path / "index")
    with pytest.raises(CorruptError, match="0abc.npz"):
        open_npy(tmp_path / "index" / "0abc.npz")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write_datacomp(tmp_path / "index")
    return import_files(
        open_vectors("datacomp", tmp_path / "index", arrays={"image": ["l14_img"]}), tmp_path / "cache"
    )[0]


def test_uids_are_a_selection(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("\n".join(UIDS[3:9]))
    export_selection(cache.path, tmp_path / "some.txt", tmp_path / "uids.npy", "datacomp")
    uids = [f"{high:016x}{low:016x}" for high, low in np.load(tmp_path / "uids.npy").tolist()]
    assert uids == sorted(UIDS[3:9])
    assert read_selection(tmp_path / "uids.npy", [cache]).tolist() == [3, 4, 5, 6, 7, 8]
    words = ("export", "npy", cache.path, "out", "--selection", "uids.npy")
    assert "6 rows" in succeed(*words, cwd=tmp_path)
    words = ("curate", "select", cache.path, "out.parquet", "--method", "random", "--budget", "2")
    succeed(*words, "--selection", "uids.npy", cwd=tmp_path)
    assert set(read_selection(tmp_path / "out.parquet", [cache]).tolist()) < {3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("array", [np.array([(1, 2), (3, 4)], "u8,u8"), np.zeros(3)])
def test_wrong_uid_lists_raise(cache: Cache, tmp_path: Path, array: Array) -> None:
    np.save(tmp_path / "uids.npy", array)
    with pytest.raises(DataError, match=r"2 of 2 keys|expected a list of uids"):
        read_selection(tmp_path / "uids.npy", [cache])
