"""DataComp's metadata and lists of uids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import Array
from embedcache.curate.select.export import export_selection
from embedcache.dataset.selections import read_selection
from embedcache.errors import CorruptError, DataError, PathError, SettingError, UnknownNameError
from embedcache.store.cache import Cache
from embedcache.vectors.opening import open_npy, open_vectors
from tests.cli.run import succeed
from tests.vectors.cases import import_files, unit_rows

UIDS = [f"{row * 0x9E3779B97F4A7C15 % 2**128:032x}" for row in range(1, 21)]


def write_metadata(folder: Path, *, compressed: bool = False) -> dict[str, Array]:
    """Write two shards as DataComp's index has them; give all rows of each array."""
    folder.mkdir()
    arrays = {
        name: unit_rows(20, width, seed=width) for name, width in (("b32_img", 8), ("l14_img", 12), ("l14_txt", 12))
    }
    save = np.savez_compressed if compressed else np.savez
    for number, rows in enumerate((slice(0, 12), slice(12, 20))):
        save(folder / f"{number}abc.npz", **{name: array[rows] for name, array in arrays.items()})
        texts = [f"caption {uid[:4]}" for uid in UIDS[rows]]
        scores = [float(row) for row in range(len(texts))]
        table = pa.table({"uid": UIDS[rows], "url": texts, "text": texts, "clip_l14_similarity_score": scores})
        pq.write_table(table, folder / f"{number}abc.parquet")
    return arrays


@pytest.mark.parametrize("compressed", [False, True])
def test_named_arrays_are_imported(tmp_path: Path, compressed: bool) -> None:
    arrays = write_metadata(tmp_path / "index", compressed=compressed)
    vectors = open_vectors(
        "datacomp", tmp_path / "index", arrays={"image": ["l14_img", "b32_img"], "text": ["l14_txt"]}
    )
    cache, _ = import_files(vectors, tmp_path / "cache", chunk_size=5)
    assert cache.samples["key"].to_pylist() == UIDS
    assert cache.samples["clip_l14_similarity_score"].to_pylist()[12] == 0
    for modality, name in (("image", "l14_img"), ("image", "b32_img"), ("text", "l14_txt")):
        np.testing.assert_array_equal(cache.feature(modality, name).load(), arrays[name], strict=True)


@pytest.mark.parametrize(
    ("arrays", "error", "word"),
    [
        ({}, SettingError, "none"),
        ({"image": ["l14_img"], "text": ["l14_img"]}, SettingError, "l14_img as image and text"),
        ({"sound": ["l14_img"]}, UnknownNameError, "audio"),
        ({"image": ["g14_img"]}, UnknownNameError, "b32_img, l14_img, l14_txt"),
    ],
)
def test_wrong_arrays_raise(tmp_path: Path, arrays: dict[str, list[str]], error: type[Exception], word: str) -> None:
    write_metadata(tmp_path / "index")
    with pytest.raises(error, match=word):
        open_vectors("datacomp", tmp_path / "index", arrays=arrays)


def test_damaged_or_unpaired_files_raise(tmp_path: Path) -> None:
    write_metadata(tmp_path / "index")
    np.save(tmp_path / "one.npy", np.zeros((2, 3)))
    for data in (b"no zip", (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "index" / "1abc.npz").write_bytes(data)
        with pytest.raises(CorruptError, match="1abc.npz"):
            open_vectors("datacomp", tmp_path / "index", arrays={"image": ["l14_img"]})
    with pytest.raises(CorruptError, match="0abc.npz"):
        open_npy(tmp_path / "index" / "0abc.npz")
    (tmp_path / "index" / "1abc.npz").unlink()
    with pytest.raises(DataError, match="npz lacks number 1abc"):
        open_vectors("datacomp", tmp_path / "index", arrays={"image": ["l14_img"]})
    with pytest.raises(PathError, match="got no .npz file"):
        open_vectors("datacomp", tmp_path, arrays={"image": ["l14_img"]})


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write_metadata(tmp_path / "index")
    return import_files(
        open_vectors("datacomp", tmp_path / "index", arrays={"image": ["l14_img"]}), tmp_path / "cache"
    )[0]


def test_uids_are_a_selection(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("\n".join(UIDS[3:9]))
    export_selection(cache.path, tmp_path / "some.txt", tmp_path / "uids.npy", "datacomp")
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
