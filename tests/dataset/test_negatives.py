"""Tables of hard negatives: written in blocks, read and counted across caches, and refused where they do not belong."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Ints, blocks
from embedcache.dataset import negatives as module
from embedcache.dataset.negatives import NegativesBlock, check_negatives, read_negatives, write_negatives
from embedcache.errors import CorruptError, DataError, PathError
from embedcache.store.cache import Cache
from tests.edits import write_rows


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


def write(path: Path, cache: Cache, negatives_SK: Ints, groups_S: Ints, block_rows: int) -> None:
    path.unlink(missing_ok=True)
    parts = [
        NegativesBlock(negatives_SK[block], (negatives_SK[block] / 100).astype(np.float32))
        for block in blocks(len(negatives_SK), block_rows)
    ]
    write_negatives(path, cache, groups_S, parts, {"method": "test"})


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 90), st.integers(0, 999), st.booleans())
def test_what_is_written_is_read(
    caches: list[Cache], folder: Path, one: int, other: int, block_rows: int, seed: int, is_reversed: bool
) -> None:
    """Check two tables of different widths, in any order, in blocks of any size."""
    tables = [made(cache.info.num_samples, width, seed) for cache, width in zip(caches, (one, other), strict=True)]
    paths = [folder / "a.parquet", folder / "b.parquet"]
    for path, cache, (negatives_SK, groups_S) in zip(paths, caches, tables, strict=True):
        write(path, cache, negatives_SK, groups_S, block_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_READ_ROWS", 1 + block_rows // 2)
        check_negatives(paths, caches)
        found = read_negatives(paths[::-1] if is_reversed else paths, caches)
    expected = [
        [number + first for number in row if number >= 0]
        for first, (negatives_SK, _) in zip((0, 40), tables, strict=True)
        for row in negatives_SK.tolist()
    ]
    assert [[number for number in row if number >= 0] for row in found.negatives_SK.tolist()] == expected
    assert found.negatives_SK.shape == (120, max(map(len, expected)))
    assert found.negatives_SK.dtype == np.int32
    groups = np.concatenate([np.where(tables[0][1] >= 0, tables[0][1], -1), tables[1][1]])
    firsts = np.repeat([0, 40], [40, 80])
    assert found.groups_S[groups >= 0].tolist() == (groups + firsts)[groups >= 0].tolist()
    assert found.groups_S[groups < 0].tolist() == (-1 - np.arange(120))[groups < 0].tolist()


def test_table_has_a_row_per_sample(caches: list[Cache], tmp_path: Path) -> None:
    negatives_SK, groups_S = made(40, 3, 0)
    write(tmp_path / "a.parquet", caches[0], negatives_SK, groups_S, 16)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["key"].to_pylist() == caches[0].column("key").to_pylist()
    assert table["group"].to_pylist() == groups_S.tolist()
    for row, (listed, scores) in enumerate(
        zip(table["negatives"].to_pylist(), table["scores"].to_pylist(), strict=True)
    ):
        assert listed == [number for number in negatives_SK[row].tolist() if number >= 0]
        assert scores == pytest.approx([number / 100 for number in listed])
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3


def test_cache_that_has_grown_has_samples_without_negatives(caches: list[Cache], tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", caches[1], *made(80, 2, 0), 80)
    found = read_negatives([tmp_path / "b.parquet"], caches)
    assert (found.negatives_SK[:40] == -1).all()
    assert found.groups_S[:40].tolist() == [-1 - row for row in range(40)]
    assert found.negatives_SK[40:].max() >= 40


def test_samples_may_have_no_negatives_at_all(caches: list[Cache], tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", caches[0], np.full((40, 3), -1), np.zeros(40, np.int64), 80)
    found = read_negatives([tmp_path / "a.parquet"], caches[:1])
    assert found.negatives_SK.shape == (40, 0)
    assert found.groups_S.tolist() == [0] * 40


def test_tables_that_do_not_belong_raise(caches: list[Cache], run_path: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, cache in zip(paths, caches, strict=True):
        write(path, cache, *made(cache.info.num_samples, 1, 0), 80)
    for some, error, word in (
        ([paths[0], paths[0]], DataError, "second"),
        ([paths[1], paths[1]], DataError, "second"),
        ([tmp_path / "none.parquet"], PathError, "none.parquet"),
    ):
        with pytest.raises(error, match=word):
            check_negatives(some, caches)
    with pytest.raises(DataError, match="mine them again"):
        read_negatives([paths[1]], caches[:1])


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("text", "text.parquet"),
        ("split", "columns row"),
        ("short", "39 rows"),
        ("sorted", "has the key"),
        ("numbers", "int64"),
        ("plain", "columns key"),
    ],
)
def test_files_that_are_no_table_of_negatives_raise(
    caches: list[Cache], run_path: Path, tmp_path: Path, name: str, word: str
) -> None:
    path = tmp_path / f"{name}.parquet"
    write(path, caches[0], *made(40, 2, 0), 40)
    table = pq.read_table(path)
    if name == "text":
        path.write_text("no table")
    elif name == "split":
        shutil.copy(run_path / "split.parquet", path)
    else:
        tables = {
            "short": table.slice(0, 39),
            "sorted": table.sort_by("group"),
            "numbers": table.set_column(2, "negatives", table["group"]),
            "plain": table.replace_schema_metadata(),
        }
        write_rows(path, tables[name])
    with pytest.raises(CorruptError, match=word):
        read_negatives([path], caches)


def test_fewer_negatives_than_the_footer_counts_are_refused(caches: list[Cache], tmp_path: Path) -> None:
    """As after a flip in the header of a page, which has no checksum: the last list would be shorter."""
    path, cache = tmp_path / "a.parquet", caches[0]
    write(path, cache, np.tile(np.arange(9), (40, 1)), np.arange(40), 40)
    data, page = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    data[data.index(b"\x1c\x15", page) + 2] ^= 16  # the number of values, less 8
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="352"):
        read_negatives([path], [cache])
