import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import SettingError
from embedcache.train.batches import Loader, RowBatches, shuffle_blocks
from embedcache.train.distributed import check_batches


@pytest.mark.parametrize(("count", "block_rows"), [(5000, 2), (5001, 2), (7, 1), (3, 8)])
def test_shuffled_rows_stay_near_those_of_1024_blocks(count: int, block_rows: int) -> None:
    order = shuffle_blocks(count, block_rows, np.random.default_rng(1))
    assert sorted(order) == list(range(count))
    assert not np.array_equal(order, shuffle_blocks(count, block_rows, np.random.default_rng(2)))
    if count % block_rows == 0:
        for part in np.split(order, range(1024 * block_rows, count, 1024 * block_rows)):
            assert len(np.unique(part // block_rows)) <= 1024 or block_rows == 1


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.sampled_from([1, 3]))
def test_row_batches_have_every_row_once(count: int, size: int, epoch: int, block_rows: int) -> None:
    batches = RowBatches(np.arange(count) + 100, batch_size=size, seed=1, block_rows=block_rows)
    found = [batch.tolist() for batch in batches.epoch(epoch)]
    assert len(found) == batches.num_steps == math.ceil(count / size)
    assert sorted(row for batch in found for row in batch) == list(range(100, 100 + count))
    assert min(map(len, found)) + 1 >= max(map(len, found)) <= size
    rest = [batch.tolist() for batch in batches.epoch(epoch, first_step=len(found) // 2)]
    assert rest == found[len(found) // 2 :]


class Steps:
    """A plan of six batches, which remembers those that were asked for; the first can be loaded when the third is."""

    num_samples, num_steps = 12, 6

    def __init__(self) -> None:
        self.drawn: list[int] = []
        self.is_third = threading.Event()

    def epoch(self, number: int, *, first_step: int) -> Iterator[tuple[int, int]]:
        for step in range(first_step, self.num_steps):
            self.drawn.append(step)
            if step == 2:
                self.is_third.set()
            yield number, step

    def load(self, batch: tuple[int, int]) -> tuple[int, int]:
        assert self.is_third.wait(60)
        return batch


def test_loader_is_two_batches_ahead_on_one_thread() -> None:
    plan, started = Steps(), time.perf_counter()
    loader = Loader(plan, plan.load)
    batches = loader.epoch(7)
    assert next(batches) == (7, 0)
    assert plan.drawn == [0, 1, 2]
    assert [thread.name for thread in threading.enumerate() if "loader" in thread.name] == ["loader_0"]
    assert list(batches) == [(7, step) for step in range(1, 6)]
    assert list(loader.epoch(8, first_step=4)) == [(8, 4), (8, 5)]
    assert (loader.num_samples, loader.num_steps) == (12, 6)
    assert 0 < loader.waited_s < time.perf_counter() - started


@pytest.mark.parametrize(
    ("count", "block_rows", "buffered"), [(20, 3, 2), (21, 3, 2), (7, 2, 3), (5, 8, 1), (12, 4, 3)]
)
def test_rows_of_a_few_blocks_are_drawn_together(
    monkeypatch: pytest.MonkeyPatch, count: int, block_rows: int, buffered: int
) -> None:
    """Check that each part of the order has the rows of whole blocks, in order of no kind."""
    monkeypatch.setattr("embedcache.train.batches._BUFFER_BLOCKS", buffered)
    order = shuffle_blocks(count, block_rows, np.random.default_rng(3))
    assert sorted(order.tolist()) == list(range(count))
    starts = np.random.default_rng(3).permutation(-(-count // block_rows)) * block_rows
    drawn = [row for start in starts for row in range(start, min(start + block_rows, count))]
    size = block_rows * buffered
    for place in range(0, count, size):
        assert sorted(order[place : place + size].tolist()) == sorted(drawn[place : place + size])


def test_batch_normalization_needs_two_items() -> None:
    check_batches(4, 2, least=2)
    check_batches(3, 2)
    with pytest.raises(SettingError, match="at least 2 items"):
        check_batches(3, 2, least=2)
