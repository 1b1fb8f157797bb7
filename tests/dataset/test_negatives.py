"""Tables of hard negatives: written, read and counted across caches, and refused where they do not belong."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Ints
from embedcache.dataset.selections import read_negatives, write_negatives
from embedcache.errors import DataError
from embedcache.store.cache import Cache


@pytest.fixture(scope="module")
def caches(two_caches: list[Path]) -> list[Cache]:
    return [Cache(path) for path in two_caches]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("negatives")


def made(count: int, width: int, seed: int) -> tuple[Ints, Ints]:
    """Return (S, K) negatives, of which some are none, and (S,) groups, of which some are of no group."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1, count, (count, width)), rng.integers(-1, 5, count)


def write(path: Path, cache: Cache, negatives_SK: Ints, groups_S: Ints) -> None:
    path.unlink(missing_ok=True)
    negatives_MK = negatives_SK[groups_S >= 0]
    write_negatives(path, cache, groups_S, negatives_MK, (negatives_MK / 100).astype(np.float32), {"method": "test"})


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999), st.booleans())
def test_what_is_written_is_read(
    caches: list[Cache], folder: Path, one: int, other: int, seed: int, is_reversed: bool
) -> None:
    """Check two tables of different widths, in any order."""
    tables = [made(cache.info.num_samples, width, seed) for cache, width in zip(caches, (one, other), strict=True)]
    paths = [folder / "a.parquet", folder / "b.parquet"]
    for path, cache, (negatives_SK, groups_S) in zip(paths, caches, tables, strict=True):
        write(path, cache, negatives_SK, groups_S)
    found = read_negatives(paths[::-1] if is_reversed else paths, caches)
    expected = [
        [number + first for number in row if number >= 0 and group >= 0]
        for first, (negatives_SK, groups_S) in zip((0, 40), tables, strict=True)
        for row, group in zip(negatives_SK.tolist(), groups_S.tolist(), strict=True)
    ]
    assert [[number for number in row if number >= 0] for row in found.negatives_SK.tolist()] == expected
    assert found.negatives_SK.shape == (120, max(map(len, expected)))
    assert found.negatives_SK.dtype == np.int32
    groups = np.concatenate([tables[0][1], tables[1][1]])
    firsts = np.repeat([0, 40], [40, 80])
    assert found.groups_S[groups >= 0].tolist() == (groups + firsts)[groups >= 0].tolist()
    assert found.groups_S[groups < 0].tolist() == (-1 - np.arange(120))[groups < 0].tolist()


def test_table_has_the_samples_that_were_looked_at(caches: list[Cache], tmp_path: Path) -> None:
    negatives_SK, groups_S = made(40, 3, 0)
    write(tmp_path / "a.parquet", caches[0], negatives_SK, groups_S)
    rows = np.flatnonzero(groups_S >= 0)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["row"].to_pylist() == rows.tolist()
    assert table["group"].to_pylist() == groups_S[rows].tolist()
    lists = zip(table["negatives"].to_pylist(), table["scores"].to_pylist(), strict=True)
    for row, (listed, scores) in zip(rows.tolist(), lists, strict=True):
        assert listed == [number for number in negatives_SK[row].tolist() if number >= 0]
        assert scores == pytest.approx([number / 100 for number in listed])


def test_samples_may_have_no_negatives_at_all(caches: list[Cache], tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", caches[0], np.full((40, 3), -1), np.zeros(40, np.int64))
    found = read_negatives([tmp_path / "a.parquet"], caches[:1])
    assert found.negatives_SK.shape == (40, 0)
    assert found.groups_S.tolist() == [0] * 40


def test_tables_that_do_not_belong_raise(caches: list[Cache], tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, cache in zip(paths, caches, strict=True):
        write(path, cache, *made(cache.info.num_samples, 1, 0))
    for some in ([paths[0], paths[0]], [paths[1], paths[1]]):
        with pytest.raises(DataError, match="second"):
            read_negatives(some, caches)
    with pytest.raises(DataError, match="got those of"):
        read_negatives([paths[1]], caches[:1])
    pq.write_table(pq.read_table(paths[0]).replace_schema_metadata(), paths[0])  # nothing says whose rows are in lists
    with pytest.raises(DataError, match="another tool"):
        read_negatives([paths[0]], caches[:1])
