import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_the_other_modality_is_that_of_the_run(cache_path: Path, run_path: Path) -> None:
    for modality, other in (("image", "text"), ("text", "image")):
        assert Vectors(cache_path, modality, run_path=run_path).other_modality == other  # type: ignore[arg-type]
    assert Vectors(cache_path, "image", "open_toy/cls").other_modality is None


@pytest.mark.parametrize("cores", [{"CPU": 3.0}, {}])
def test_tasks_of_a_pass_take_one_core_and_are_repeated(
    holed: Path, monkeypatch: pytest.MonkeyPatch, cores: dict[str, float]
) -> None:
    """Stand for a Ray cluster, whose start takes seconds, and check the tasks that it gets."""
    options: list[dict[str, int]] = []

    def remote(**values: int) -> Any:
        options.append(values)
        return lambda function: SimpleNamespace(remote=lambda *given: (function, given))

    @contextmanager
    def connected(_: str | None) -> Iterator[Any]:
        yield SimpleNamespace(
            put=lambda value: value,
            remote=remote,
            get=lambda task: task[0](*task[1]),
            cluster_resources=lambda: cores,
        )

    monkeypatch.setattr("embedcache.search.vectors.connected", connected)
    rows, total = run_pass(Vectors(holed, "image"), Sums(), engine="ray")
    expected_rows, expected = run_pass(Vectors(holed, "image"), Sums())
    assert rows == expected_rows
    np.testing.assert_array_equal(total, expected)
    assert options == [{"num_cpus": 1, "max_retries": -1}]


def test_sample_is_that_of_seed_0_unless_told_otherwise(holed: Path) -> None:
    vectors = Vectors(holed, "image")
    np.testing.assert_array_equal(vectors.sample(5), vectors.sample(5, seed=0))
    assert not np.array_equal(vectors.sample(5), vectors.sample(5, seed=1))
    assert len(vectors.sample(100)) == len(vectors.rows)
