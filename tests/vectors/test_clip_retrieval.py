"""clip-retrieval's tree: what its version 2.45.0 wrote, and the rules by which it and embedding-reader read."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError, DataError, PathError, SourceError
from embedcache.vectors import exporting
from embedcache.vectors.exporting import export_vectors
from embedcache.vectors.opening import open_vectors
from tests.vectors.cases import import_files, unit_rows, write_tree

GOLDEN = Path(__file__).parents[1] / "golden" / "clip-retrieval-2.45"


def test_golden_output_is_imported(tmp_path: Path) -> None:
    cache, reports = import_files(
        open_vectors("clip-retrieval", GOLDEN), tmp_path / "cache", chunk_size=5, model="a random CLIP"
    )
    assert cache.samples["key"].to_pylist() == [f"square-{number:02d}" for number in range(12)]
    assert cache.samples["label"].to_pylist() == [number % 3 for number in range(12)]
    assert cache.items("text")["text"][11].as_py() == "a square, number 11"
    assert cache.items("image")["path"][3].as_py() == "000000003"
    for modality, name in (("image", "img_emb"), ("text", "text_emb")):
        files = sorted((GOLDEN / name).glob("*.npy"))
        expected = np.concatenate([np.load(file) for file in files])
        np.testing.assert_array_equal(cache.feature(modality, name).load(), expected, strict=True)
    assert [report.computed for report in reports] == [12, 12]
    fingerprint = cache.feature("image").fingerprint
    assert (fingerprint["family"], fingerprint["model"]) == ("imported", "a random CLIP")


def test_arrays_parse_as_in_embedding_reader(labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ROWS_PER_FILE", 3)
    export_vectors("clip-retrieval", labeled, tmp_path / "tree")
    names = sorted(path.name for path in (tmp_path / "tree" / "img_emb").iterdir())
    assert names == [f"img_emb_{number:02d}.npy" for number in range(13)]  # int(log10(13)) + 1 digits
    for name in ("img_emb", "text_emb"):
        for number, path in enumerate(sorted((tmp_path / "tree" / name).iterdir())):
            first_line = path.read_bytes()[:300].split(b"\n")[0]
            assert re.search(rb"'descr': '<f2'", first_line)
            shape = re.search(rb"'shape': \((\d+), (\d+)\)", first_line)
            assert shape is not None
            rows, width = int(shape[1]), int(shape[2])
            assert path.stat().st_size == len(first_line) + 1 + rows * width * 2
            vectors = np.load(path)
            assert vectors.flags.c_contiguous
            np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
            metadata = pq.read_table(tmp_path / "tree" / "metadata" / f"metadata_{number:02d}.parquet")
            assert len(metadata) == rows
            assert metadata["caption"].null_count == metadata["image_path"].null_count == 0


def test_row_numbers_are_keys_without_metadata(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", unit_rows(25))
    for path in (tree / "metadata").iterdir():
        path.unlink()
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    assert cache.samples["key"].to_pylist()[::12] == ["000000000", "000000012", "000000024"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        (lambda tree: [shutil.rmtree(tree / f"{name}_emb") for name in ("img", "text")], PathError, "img_emb"),
        (lambda tree: (tree / "metadata/metadata_1.parquet").unlink(), DataError, "number 1"),
        (lambda tree: np.save(tree / "text_emb/text_emb_2.npy", unit_rows(4)), DataError, "has 4"),
        (lambda tree: truncate(tree / "img_emb/img_emb_1.npy"), CorruptError, "img_emb_1.npy"),
        (lambda tree: (tree / "img_emb/img_emb_0.npy").write_bytes(b"\x80\x04 pickle"), CorruptError, "img_emb_0.npy"),
    ],
)
def test_damaged_tree_raises(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], word: str
) -> None:
    tree = write_tree(tmp_path / "tree", unit_rows(25), caption=["a"] * 25)
    damage(tree)
    with pytest.raises(error, match=word):
        open_vectors("clip-retrieval", tree)


@pytest.mark.parametrize("count", [24, 26])
def test_metadata_of_another_length(tmp_path: Path, count: int) -> None:
    tree = write_tree(tmp_path / "tree", unit_rows(25), rows_per_file=100)
    np.save(tree / "img_emb" / "img_emb_0.npy", unit_rows(count))
    with pytest.raises(SourceError, match=rf"metadata_0.parquet: expected {count} rows as in .*img_emb_0.npy, got 25"):
        import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((5, 8)), "float64"),
        (np.zeros((5, 8), ">f4"), ">f4"),
        (np.zeros((5, 8), np.int64), "int64"),
        (np.zeros(5, np.float16), "shape"),
        (np.zeros((5, 9), np.float16), "8 components"),
    ],
)
def test_unsupported_arrays_raise(tmp_path: Path, array: np.ndarray, word: str) -> None:  # type: ignore[type-arg]
    tree = write_tree(tmp_path / "tree", unit_rows(25))
    np.save(tree / "img_emb" / "img_emb_2.npy", array)
    with pytest.raises(DataError, match=word):
        open_vectors("clip-retrieval", tree)
