"""Existing values of a chunk stay unchanged when more are written to it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import Array
from embedcache.axis import Axis
from embedcache.errors import CorruptError, FingerprintError
from embedcache.store.commits import NOT_YET
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, add_feature, create_group
from embedcache.store.layout import CacheInfo, TableVersion, write_info
from embedcache.store.writer import commit_chunk
from tests.store.features import FINGERPRINT

SHAPES = pytest.mark.parametrize("shape", [(3,), (2, 3), (-1, 3)])


def group_of(path: Path, num_items: int, *, earlier: int | None = None) -> EncoderGroup:
    """Create a cache with chunks of four; `earlier` is its number of items when its identity was `s`."""
    index_digest = "s" if earlier is None else "longer"
    states = () if earlier is None else (TableVersion(index_digest="s", num_items={"image": earlier}),)
    info = CacheInfo(
        chunk_size=4,
        source={},
        index_digest=index_digest,
        num_samples=num_items,
        num_items={"image": num_items},
        earlier_versions=states,
    )
    write_info(path, info)
    (path / "image").mkdir(exist_ok=True)
    pq.write_table(pa.table({"path": [f"{row}.png" for row in range(num_items)]}), path / "image/items.parquet")
    return create_group(path, "image", "test", info, spec="test:m", fingerprint=FINGERPRINT)


def item(value: float, shape: tuple[int, ...]) -> Array:
    return np.full([2 if size < 0 else size for size in shape], value, np.float16)


def commit(group: EncoderGroup, items: list[Array | None], *, feature: str = "f", mends: bool = False) -> None:
    reasons = [None if item is not None else "broken" for item in items]
    hashes: list[bytes | None] = [bytes(16)] * len(items)
    commit_chunk(group, 0, {feature: items}, hashes, {feature: reasons}, overwrite_failed=mends)


def values(group: EncoderGroup, feature: str = "f") -> list[float | None]:
    """Read the first value of each item."""
    record = group.commit(0)
    assert record is not None
    return [None if item is None else float(item.flat[0]) for item in Feature(group, feature).items(record)]


@SHAPES
def test_commit_keeps_stored_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    group = group_of(tmp_path, 3)
    add_feature(group, "f", shape, "float16")
    commit(group, [item(0, shape), None, item(2, shape)])
    longer = group_of(tmp_path, 4, earlier=3)
    add_feature(longer, "f", shape, "float16")
    before = longer.commit(0)
    assert before is not None
    assert before.failures["f"] == [None, "broken", None, NOT_YET]
    commit(longer, [item(10 + row, shape) for row in range(4)])
    assert values(longer) == [0, None, 2, 13]
    after = longer.commit(0)
    assert after is not None
    assert after.failures["f"] == [None, "broken", None, None]
    assert after.index_digest == "longer"


def test_commit_overwrites_damaged_rows(tmp_path: Path) -> None:
    group = group_of(tmp_path, 3)
    add_feature(group, "f", (3,), "float16")
    commit(group, [item(row, (3,)) for row in range(3)])
    longer = group_of(tmp_path, 4, earlier=3)
    add_feature(longer, "f", (3,), "float16")
    (tmp_path / "image/test/f/c/0/0").unlink()
    commit(longer, [item(10 + row, (3,)) for row in range(4)])
    assert values(longer) == [10, 11, 12, 13]


@SHAPES
def test_commit_overwrites_only_failed_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    group = group_of(tmp_path, 4)
    add_feature(group, "f", shape, "float16")
    add_feature(group, "other", shape, "float16")
    commit(group, [item(0, shape), None, None, item(3, shape)])
    commit(group, [None, None, item(2, shape), item(3, shape)], feature="other")
    again = [item(10, shape), item(11, shape), None, item(13, shape)]
    commit_chunk(group, 0, {"f": again}, [None] * 4, {"f": [None, None, "gone", None]}, overwrite_failed=True)
    assert values(group) == [0, 11, None, 3]
    record = group.commit(0)
    assert record is not None
    assert record.failures == {"f": [None, None, "broken", None], "other": ["broken", "broken", None, None]}
    assert record.hashes == [bytes(16)] * 4
    assert values(group, "other") == [None, None, 2, 3]


def test_commit_keeps_stored_feature(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    add_feature(group, "f", (3,), "float16")
    commit(group, [item(row, (3,)) for row in range(4)])
    commit(group, [item(10 + row, (3,)) for row in range(4)])
    assert values(group) == [0, 1, 2, 3]


def test_concurrent_commits_lose_nothing(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    names = [f"f{number}" for number in range(12)]
    for name in names:
        add_feature(group, name, (3,), "float16")
    code = (
        "import sys; from pathlib import Path; from embedcache.store.cache import Cache\n"
        "from tests.store.test_writer import commit, item\n"
        "(group,) = Cache(Path(sys.argv[1])).encoders('image')\n"
        "for name in sys.argv[2:]:\n"
        "    commit(group, [item(1, (3,))] * 4, feature=name)\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *some]) for some in (names[:3], names[3:6])]
    with ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda name: commit(group, [item(1, (3,))] * 4, feature=name), names[6:]))
    assert [other.wait() for other in others] == [0, 0]
    record = group.commit(0)
    assert record is not None
    assert sorted(record.features) == sorted(names)
    assert all(values(group, name) == [1] * 4 for name in names)


def test_commit_replaced_item_raises(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    add_feature(group, "f", (3,), "float16")
    add_feature(group, "g", (3,), "float16")
    commit(group, [item(0, (3,)), None, item(0, (3,)), item(0, (3,))])
    new = [item(0, (3,))] * 4
    reasons = {"g": [None] * 4}
    commit_chunk(group, 0, {"g": new}, [bytes(16), b"1" * 16, bytes(16), bytes(16)], reasons)  # row 1 was never used
    with pytest.raises(FingerprintError, match="image 2.png in row 2 has other bytes now than when test was extracted"):
        commit_chunk(group, 0, {"g": new}, [bytes(16), b"1" * 16, b"1" * 16, bytes(16)], reasons, overwrite_failed=True)


def test_commit_to_folder_of_another_encoder_raises(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    other = replace(group, fingerprint={**FINGERPRINT, "weights": "other"})
    with pytest.raises(FingerprintError, match=r"weights"):
        commit(other, [item(0, (3,))] * 4)


def test_commit_other_dtype_raises(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    add_feature(group, "f", (3,), "float32")
    with pytest.raises(FingerprintError, match="stored as float32, got float16"):
        commit(group, [item(0, (3,))] * 4)


def test_commit_with_changed_hash_raises(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    add_feature(group, "f", (3,), "float16")
    commit(group, [item(0, (3,))] * 4)
    path = tmp_path / "image/test/chunks/00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "hash", [[b"1" * 16] * 4]).cast(table.schema), path)
    with pytest.raises(CorruptError, match="has changed since it was written"):
        group.commit(0)


GRID = Axis(kind="grid", rows=1, columns=2, box=(0.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize("shape", [(2, 3), (-1, 3)])
def test_axis_is_stored_with_new_features_only(tmp_path: Path, shape: tuple[int, ...]) -> None:
    group = group_of(tmp_path, 3)
    add_feature(group, "f", shape, "float16", axis=GRID)
    assert Feature(group, "f").axis == GRID
    add_feature(group, "old", shape, "float16")
    commit(group, [item(row, shape) for row in range(3)], feature="old")
    metadata = (group.path / "old" / "zarr.json").read_bytes()
    add_feature(group, "old", shape, "float16", axis=GRID)
    assert (group.path / "old" / "zarr.json").read_bytes() == metadata
    longer = group_of(tmp_path, 4, earlier=3)
    add_feature(longer, "old", shape, "float16", axis=GRID)  # samples were appended: the lengths change, not the axis
    assert Feature(longer, "old").axis is None


def test_other_axis_is_refused(tmp_path: Path) -> None:
    group = group_of(tmp_path, 3)
    add_feature(group, "f", (2, 3), "float16", axis=GRID)
    commit(group, [item(row, (2, 3)) for row in range(3)])
    with pytest.raises(FingerprintError, match="axis.box: stored .*, requested None"):
        add_feature(group, "f", (2, 3), "float16", axis=GRID.without_box)


def test_invalid_axis_is_corrupt(tmp_path: Path) -> None:
    group = group_of(tmp_path, 3)
    add_feature(group, "f", (2, 3), "float16", axis=GRID)
    path = group.path / "f" / "zarr.json"
    path.write_text(path.read_text().replace('"grid"', '"gird"'))
    with pytest.raises(CorruptError, match="feature test/f: axis: expected the kind time, grid"):
        Feature(group, "f")
