import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from embedcache.arrays import Floats, Ints
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, SettingError, UnfinishedError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.maintain.remove import remove_samples
from embedcache.neighbors.knn import scan
from embedcache.sources import open_source
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE

Found = tuple[list[int], np.ndarray]


def add_up(rows_B: Ints, vectors_BP: Floats) -> Found:
    """Return the rows of a chunk, and the sum of its vectors."""
    assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
    return rows_B.tolist(), vectors_BP.sum(axis=0, dtype=np.float32)


def scan_all(vectors: Vectors, **options: Any) -> Found:
    """Return the rows of a pass in the order of its chunks, and the sum of their vectors in that order."""
    parts = list(scan(vectors, add_up, **options))
    return [row for rows, _ in parts for row in rows], np.sum([total for _, total in parts], axis=0)


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images in chunks of four, whose third and second chunk has broken ones."""
    folder = tmp_path_factory.mktemp("holed")
    write_images(folder / "s", 30)
    for number in (8, 9, 10, 11, 5):
        (folder / "s" / f"{number:05d}.png").write_bytes(b"not an image")
    extract(open_source(folder / "s"), folder / "cache", image_encoder=[IMAGE], settings=ExtractSettings(chunk_size=4))
    return folder / "cache"


def test_pass_visits_valid_rows_in_order(cache_path: Path, holed: Path) -> None:
    progress = RecordedProgress()
    rows, _ = scan_all(Vectors(cache_path, "image", "open_toy/cls"), progress=progress)
    assert rows == list(range(300))
    assert (progress.started, progress.advances) == ([("reading vectors", 300, "images")], [64] * 4 + [44])
    rows, total = scan_all(Vectors(holed, "image"))
    assert rows == [row for row in range(30) if row not in (5, 8, 9, 10, 11)]
    vectors = Vectors(holed, "image")
    assert total == pytest.approx(vectors.read(vectors.rows).sum(axis=0), rel=1e-5)


def test_shown_reading_has_the_same_bits(cache_path: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.dataset.vectors._READ_ROWS", 64)
    monkeypatch.setattr("embedcache.projectors.base._BLOCK", 32)
    plain, projected = Vectors(cache_path, "image", "open_toy/cls"), Vectors(cache_path, "image", run_path=run_path)
    rows = np.random.default_rng(0).permutation(300)[:150]
    for vectors, advances in ((plain, [64, 64, 22]), (projected, [32, 32, 32, 32, 22])):
        progress = RecordedProgress()
        np.testing.assert_array_equal(vectors.read(rows, progress), vectors.read(rows))
        assert (progress.started, progress.advances) == ([("reading vectors", 150, "images")], advances)
        (progress := RecordedProgress()).start("another step", 1, "things")
        found = np.concatenate([part for _, part in vectors.blocks("comparing", progress)])
        np.testing.assert_array_equal(found, vectors.read(np.arange(300)))
        assert progress.started[1:] == [("comparing", 300, "images")]
        assert progress.counts == {"comparing": 300}


def test_vectors_pickle(holed: Path) -> None:
    vectors = Vectors(holed, "image")
    again = copy.deepcopy(vectors)  # through what pickle would go through
    for number in range(vectors.num_chunks):
        for one, other in zip(vectors.chunk(number), again.chunk(number), strict=True):
            assert np.array_equal(one, other)
    assert vectors.width == vectors.chunk(2)[1].shape[1] == 48


def test_the_other_modality_is_that_of_the_run(cache_path: Path, run_path: Path) -> None:
    for modality, other in (("image", "text"), ("text", "image")):
        assert Vectors(cache_path, modality, run_path=run_path).other_modality == other  # type: ignore[arg-type]
    assert Vectors(cache_path, "image", "open_toy/cls").other_modality is None


def test_sample_is_that_of_seed_0_unless_told_otherwise(holed: Path) -> None:
    vectors = Vectors(holed, "image")
    np.testing.assert_array_equal(vectors.sample(5), vectors.sample(5, seed=0))
    assert not np.array_equal(vectors.sample(5), vectors.sample(5, seed=1))
    assert len(vectors.sample(100)) == len(vectors.rows)


def test_captions_of_one_language(captioned: Path) -> None:
    every = Vectors(captioned, "text")
    for vectors, rows in (
        (Vectors(captioned, "text", language="any"), range(8)),
        (Vectors(captioned, "text", language="de"), (4, 5)),
        (Vectors(captioned, "image", language="de"), range(5)),  # of texts only
    ):
        assert vectors.rows.tolist() == list(rows)
        if vectors.modality == "text":
            is_among = [row in rows for row in (3, 5, 6)]
            assert vectors.has(np.array([3, 5, 6])).tolist() == is_among
            np.testing.assert_array_equal(np.concatenate([part for part, _ in vectors.blocks()]), list(rows))
            found = np.concatenate([part for _, part in vectors.blocks()])
            np.testing.assert_array_equal(found, every.read(np.array(rows)))
    with pytest.raises(UnknownNameError):
        Vectors(captioned, "text", language="fr").chunk(0)


def test_width_and_device(cache_path: Path, run_path: Path) -> None:
    for width, expected in ((None, 48), (48, 48), (1, 1)):
        assert Vectors(cache_path, "image", "open_toy/cls", width=width).width == expected
    with pytest.raises(SettingError, match="49"):
        Vectors(cache_path, "image", "open_toy/cls", width=49)
    assert Vectors(cache_path, "image", "open_toy/cls", device="auto").device == "auto"
    vectors = Vectors(cache_path, "image", run_path=run_path, device="auto")
    assert (vectors.device, vectors.width, vectors.full_width) == ("cpu", 16, 16)


def test_unfinished_feature_raises_unless_it_was_indexed(holed: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(holed, tmp_path / "cache"))
    (cache / "image/open_toy/chunks/00001.json").unlink()
    with pytest.raises(UnfinishedError, match="1 of 8"):
        Vectors(cache, "image")
    assert Vectors(cache, "image", on_demand=True).read(np.array([0])).shape == (1, 48)


def test_feature_without_values_raises(tmp_path: Path) -> None:
    write_images(tmp_path / "s", 2)
    (tmp_path / "s/00000.png").write_bytes(b"not an image")
    extract(open_source(tmp_path / "s"), tmp_path / "cache", image_encoder=[IMAGE])
    remove_samples(tmp_path / "cache", ["00001"])
    with pytest.raises(DataError, match="none"):
        Vectors(tmp_path / "cache", "image")
