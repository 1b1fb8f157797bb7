import copy
from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import Floats, Ints
from embedcache.errors import DataError, MissingExtraError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.search.vectors import Vectors, run_pass
from embedcache.sources import open_source
from tests.images import write_images
from tests.toy import IMAGE

Found = tuple[list[int], np.ndarray]


class Sums:
    """The rows in the order of their merges, and the sum of their vectors in that order."""

    def process(self, rows_B: Ints, vectors_BP: Floats) -> Found:
        return rows_B.tolist(), vectors_BP.sum(axis=0, dtype=np.float32)

    def merge(self, before: Found, after: Found) -> Found:
        return before[0] + after[0], before[1] + after[1]


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
    rows, _ = run_pass(Vectors(cache_path, "image", "open_toy/cls"), Sums())
    assert rows == list(range(300))
    rows, total = run_pass(Vectors(holed, "image"), Sums())
    assert rows == [row for row in range(30) if row not in (5, 8, 9, 10, 11)]
    vectors = Vectors(holed, "image")
    assert total == pytest.approx(vectors.read(vectors.rows).sum(axis=0), rel=1e-5)


def test_vectors_pickle(holed: Path) -> None:
    vectors = Vectors(holed, "image")
    again = copy.deepcopy(vectors)  # through what pickle would go through
    for number in range(vectors.num_chunks):
        for one, other in zip(vectors.chunk(number), again.chunk(number), strict=True):
            assert np.array_equal(one, other)
    assert vectors.width == vectors.chunk(2)[1].shape[1] == 48


def test_token_feature_raises(cache_path: Path) -> None:
    with pytest.raises(DataError, match="open_toy/patches: expected one vector per item"):
        Vectors(cache_path, "image", "open_toy/patches")


def test_missing_ray_names_extra(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"embedcache\[ray\]"):
        run_pass(Vectors(holed, "image"), Sums(), engine="ray")
