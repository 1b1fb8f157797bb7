"""Stored values stay unchanged when more are written to a chunk, and the loop over chunks computes only what lacks."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedcache.arrays import Array
from embedcache.errors import DataError, FingerprintError, UnfinishedError
from embedcache.progress import NullProgress
from embedcache.provenance import IMPORTED
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, Commit
from embedcache.store.feature import EncoderGroup, Feature, create_group
from embedcache.store.layout import Axis, TableVersion, commit_path, read_info, write_info
from embedcache.store.producer import OneByOne, Output, Verb, fill, fill_all
from embedcache.store.writer import ChunkFeatures, add_feature, chunk_files, commit_chunk, withdraw
from tests.crash import start_call
from tests.edits import write_tables
from tests.store.features import FINGERPRINT, made_info, random_items, write_feature, written

SHAPES = pytest.mark.parametrize("shape", [(3,), (2, 3), (-1, 3)])


def group_of(path: Path, num_items: int, *, earlier: int | None = None) -> EncoderGroup:
    """Create a cache with chunks of four; `earlier` is its number of items when its identity was `s`."""
    counts = [num_items] if earlier is None else [earlier, num_items - earlier]
    parts = [made_info(count, {"image": count}, chunk_size=4).parts[0] for count in counts]
    index_digest = "s" if earlier is None else "longer"
    versions = () if earlier is None else (TableVersion(index_digest="s", num_parts=1),)
    info = replace_fields(
        made_info(1, {}, chunk_size=4), parts=parts, index_digest=index_digest, earlier_versions=versions
    )
    write_info(path, info)
    if earlier is None:
        write_tables(path, image=pa.table({"path": [f"{row}.png" for row in range(num_items)]}))
    info = read_info(path)
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
    assert before.failures["f"] == [None, "broken", None, PENDING]
    commit(longer, [item(10 + row, shape) for row in range(4)])
    assert values(longer) == [0, None, 2, 13]
    after = longer.commit(0)
    assert after is not None
    assert after.failures["f"] == [None, "broken", None, None]
    assert after.index_digest == "longer"


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
    assert record.failures == {"f": [None, None, "gone", None], "other": ["broken", "broken", None, None]}
    assert record.hashes == [bytes(16)] * 4
    assert values(group, "other") == [None, None, 2, 3]


@pytest.mark.slow
def test_concurrent_commits_lose_nothing(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    names = [f"f{number}" for number in range(12)]
    for name in names:
        add_feature(group, name, (3,), "float16")
    others = [start_call(commit_ones, tmp_path, some) for some in (names[:3], names[3:6])]
    with ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda name: commit(group, [item(1, (3,))] * 4, feature=name), names[6:]))
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0]
    record = group.commit(0)
    assert record is not None
    assert sorted(record.features) == sorted(names)
    assert all(values(group, name) == [1] * 4 for name in names)


def commit_ones(cache: Path, names: Sequence[str]) -> None:
    (group,) = Cache(cache).encoders("image")
    for name in names:
        commit(group, [item(1, (3,))] * 4, feature=name)


def test_commit_to_folder_of_another_encoder_raises(tmp_path: Path) -> None:
    group = group_of(tmp_path, 4)
    other = replace(group, fingerprint={**FINGERPRINT, "weights": "other"})
    with pytest.raises(FingerprintError, match=r"weights"):
        commit(other, [item(0, (3,))] * 4)


GRID = Axis(kind="grid", rows=1, columns=2, box=(0.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize("shape", [(2, 3), (-1, 3)])
def test_axis_is_stored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    group = group_of(tmp_path, 3)
    add_feature(group, "f", shape, "float16", axis=GRID)
    assert Feature(group, "f").axis == GRID
    commit(group, [item(row, shape) for row in range(3)])
    with pytest.raises(FingerprintError, match="axis"):
        add_feature(group, "f", shape, "float16")
    for box in ((0.0, 0.5, 1.0, 0.5), (0.5, 0.0, 0.5, 1.0), (0.0, 1.0, 1.0, 0.0)):
        with pytest.raises(DataError, match="expected a box x0, y0, x1, y1"):
            replace_fields(GRID, box=box)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3), (0, 3), (-1, 3)])
def test_files_of_a_chunk_are_named_before_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("embedcache.store.layout._TOKEN_CHUNK_BYTES", 2 * 3 * 2 * 2)  # of 2 rows
    feature = write_feature(tmp_path, random_items(11, shape, seed=0, failed=[8]), shape, chunk_size=4)
    group, path = feature.group, feature.group.path / "f"
    files = [chunk_files(group, "f", chunk) for chunk in range(3)]
    assert all(len(set(names)) == len(names) == len(files[0]) for names in files)
    array = {path / name / "zarr.json" for name in (("", "lengths", "values") if shape[0] < 0 else ("",))}
    assert {file for names in files for file in names} == {file for file in path.rglob("*") if file.is_file()} - array


def test_tokens_of_a_chunk_that_grew_are_kept_and_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four items in arrays of two rows: the second array exists only once there is a third item."""
    monkeypatch.setattr("embedcache.store.layout._TOKEN_CHUNK_BYTES", 2 * 2 * 3 * 2)
    group = group_of(tmp_path, 1)
    add_feature(group, "f", (2, 3), "float16")
    commit(group, [item(0, (2, 3))])
    longer = group_of(tmp_path, 4, earlier=1)
    feature, record = Feature(longer, "f"), longer.commit(0)
    assert record is not None
    assert [(rows, len(values)) for rows, values in feature.read_chunk(record)] == [(slice(0, 2), 2)]
    assert [one is None for one in feature.items(record)] == [False, True]
    with pytest.raises(UnfinishedError, match="feature test/f is not finished: 1 of 1 chunks is missing"):
        feature.load()
    add_feature(longer, "f", (2, 3), "float16")
    commit(longer, [item(10 + row, (2, 3)) for row in range(4)])
    assert values(longer) == [0, 11, 12, 13]


@pytest.mark.parametrize("counts", [[0, 0], [0, 1], [1, None], [None, None]])
def test_chunks_with_few_tokens(tmp_path: Path, counts: list[int | None]) -> None:
    items = [None if count is None else np.ones((count, 3), np.float16) for count in counts]
    feature = write_feature(tmp_path, items, (-1, 3), chunk_size=2)
    num_tokens = sum(count or 0 for count in counts)
    metadata = json.loads((feature.group.path / "f/values/00000/zarr.json").read_text())
    assert (metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]) == ([num_tokens, 3], [1, 3])
    assert [None if one is None else one.tolist() for one in feature.items(feature.commits[0])] == [  # type: ignore[arg-type]
        None if one is None else one.tolist() for one in items
    ]
    assert feature.num_tokens == num_tokens


def test_items_of_other_encoders_are_compared(tmp_path: Path) -> None:
    first = group_of(tmp_path, 4)
    add_feature(first, "f", (3,), "float16")
    commit(first, [item(0, (3,))] * 3 + [None])
    other, imported = (
        create_group(tmp_path, "image", name, first.info, spec="s:m", fingerprint={"family": name})
        for name in ("other", IMPORTED)
    )
    new, hashes = [item(1, (3,))] * 4, [bytes(16), None, b"1" * 16, b"1" * 16]
    for group in (other, imported):
        add_feature(group, "f", (3,), "float16")
    words = (
        "image 2.png in row 2 has other bytes now than when test was extracted; put the old file back, or extract "
        "into a new folder"
    )
    with pytest.raises(FingerprintError, match=words):
        commit_chunk(other, 0, {"f": new}, hashes, {"f": [None] * 4})
    commit_chunk(imported, 0, {"f": new}, hashes, {"f": [None] * 4})  # nobody has their items
    (tmp_path / "image/test/chunks/00000.json").write_bytes(b"damaged")
    hashes = [bytes(16), None, b"1" * 16, None]
    with pytest.raises(FingerprintError, match="row 0 has other bytes now than when imported was extracted"):
        commit_chunk(other, 0, {"f": new}, [b"2" * 16, *hashes[1:]], {"f": [None] * 4})
    commit_chunk(other, 0, {"f": new}, hashes, {"f": [None] * 4})
    assert values(other) == [1] * 4


def test_withdrawn_features_leave_the_others(tmp_path: Path) -> None:
    group, path = group_of(tmp_path, 4), tmp_path / "image/test/chunks/00000.json"
    for name in ("f", "g"):
        add_feature(group, name, (3,), "float16")
        commit(group, [item(0, (3,))] * 4, feature=name)
    before = written(path)
    withdraw(group, 0, ["none"])
    withdraw(group, 1, ["f"])
    assert written(path) == before
    withdraw(group, 0, ["f"])
    record = group.commit(0)
    assert record is not None
    assert (list(record.features), list(record.attributes)) == (["g"], ["g"])
    withdraw(group, 0, ["g"])
    assert not path.exists()
    path.write_bytes(b"damaged")
    withdraw(group, 0, ["g"])
    assert not path.exists()


ITEMS = random_items(9, (4,), seed=1, failed=[2, 8])


class Items:
    """A producer of the items of a list; None is one that fails."""

    verb: Verb = "copied"

    def __init__(self, items: Sequence[Array | None] = ITEMS) -> None:
        self.outputs = {"f": Output((4,), "float32")}
        self.computed: list[int] = []
        self._items = items

    def compute(self, rows: slice) -> ChunkFeatures:
        items = self._items[rows]
        self.computed.append(rows.start)
        hashes = [f"{row:016}".encode() for row in range(rows.start, rows.stop)]
        return ChunkFeatures({"f": items}, hashes, {"f": [None if item is not None else "broken" for item in items]})

    def retries(self, _: Commit) -> bool:
        return False


@pytest.fixture
def group(tmp_path: Path) -> EncoderGroup:
    """A folder that lacks all three chunks."""
    return write_feature(tmp_path, ITEMS, (4,), chunk_size=4, dtype="float32", skip_chunks=[0, 1, 2]).group


def test_fills_missing_chunks_only(group: EncoderGroup) -> None:
    report = fill(group, Items(), progress=NullProgress())
    assert (report.computed, report.reused, report.failures) == (9, 0, {"broken": 2})

    withdraw(group, 1, ["f"])
    again = Items()
    report = fill(group, again, progress=NullProgress())
    assert again.computed == [4]
    assert (report.computed, report.reused, report.failures) == (4, 5, {"broken": 2})


def test_retries_failed_rows_and_computes_missing_chunks(group: EncoderGroup) -> None:
    fill(group, Items(), progress=NullProgress())
    withdraw(group, 1, ["f"])
    good = random_items(9, (4,), seed=2)
    retried = Items(good)
    (report,) = fill_all([OneByOne(group, retried)], rows="failed", progress=NullProgress())
    assert (retried.computed, report.failures) == ([0, 4, 8], {})

    stored = Feature(group, "f").load()
    assert ITEMS[0] is not None
    np.testing.assert_array_equal(stored[0], ITEMS[0])
    assert good[2] is not None
    np.testing.assert_array_equal(stored[2], good[2])


def test_retry_without_a_new_value_writes_nothing(group: EncoderGroup) -> None:
    fill(group, Items(), progress=NullProgress())
    before = written(commit_path(group.path, 0))
    producer = OneByOne(group, Items([None] * 9))
    (report,) = fill_all([producer], rows="failed", progress=NullProgress())
    assert report.failures == {"broken": 2}
    assert written(commit_path(group.path, 0)) == before
