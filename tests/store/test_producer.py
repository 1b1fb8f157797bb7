"""The loop over chunks: what it computes, what it leaves, and what its report counts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import Array
from embedcache.progress import NullProgress
from embedcache.store.commits import Commit
from embedcache.store.feature import EncoderGroup, Feature
from embedcache.store.layout import commit_path
from embedcache.store.producer import OneByOne, Output, Verb, fill, fill_all
from embedcache.store.writer import ChunkFeatures, withdraw
from tests.store.features import random_items, write_feature, written

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
