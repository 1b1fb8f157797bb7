"""Random batches of rows, and reading ahead."""

import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import SettingError
from embedcache.train.batches import RowBatches, read_ahead, shuffle_blocks
from embedcache.train.distributed import check_batches


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.sampled_from([1, 3]))
def test_row_batches_have_every_row_once(count: int, size: int, epoch: int, block_rows: int) -> None:
    batches = RowBatches(np.arange(count) + 100, batch_size=size, seed=1, block_rows=block_rows)
    found = [batch.tolist() for batch in batches.epoch(epoch)]
    assert len(found) == batches.num_steps == math.ceil(count / size)
    assert sorted(row for batch in found for row in batch) == list(range(100, 100 + count))
    assert min(map(len, found)) + 1 >= max(map(len, found)) <= size
    rest = [batch.tolist() for batch in batches.epoch(epoch, first_step=len(found) // 2)]
    assert rest == found[len(found) // 2 :]


def test_batches_are_read_ahead_on_one_thread() -> None:
    is_third = threading.Event()
    threads = set()

    def make() -> Iterator[int]:
        for number in range(6):
            threads.add(threading.current_thread().name)
            if number == 2:
                is_third.set()
            yield number

    batches = read_ahead(make())
    assert next(batches) == 0
    assert is_third.wait(60)  # before the second one is asked for
    assert list(batches) == [1, 2, 3, 4, 5]
    assert threads == {"loader_0"}


def test_error_of_a_batch_reaches_the_loop() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise SettingError("no")

    batches = read_ahead(make())
    assert next(batches) == 1
    with pytest.raises(SettingError, match="no"):
        next(batches)


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


def test_each_process_needs_its_items() -> None:
    check_batches(4, 2, least=2)
    check_batches(3, 2)
    with pytest.raises(SettingError, match="at least 2 items"):
        check_batches(3, 2, least=2)
