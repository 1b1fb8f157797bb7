from itertools import count

import pytest

from embedcache.arrays import Floats
from embedcache.metrics import durations
from embedcache.metrics.durations import MeasuredDuration, note_duration
from tests.recorded import RecordedProgress


def test_duration_is_that_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shapes, seconds = (
        [0.0],
        [],
        iter([2.0, *(2.0, 3.0, 2.0, 4.0), *(9.0, 3.0, 4.0, 2.0), *(9.0, 2.0, 1.0, 3.0)]),
    )

    def compare(queries: Floats, candidates: Floats) -> None:
        shapes.append((queries.shape, candidates.shape))
        clock[0] += next(seconds)

    monkeypatch.setattr(durations.time, "perf_counter", lambda: clock[0])
    progress = RecordedProgress()
    for num_pairs in (60, 61, 60_000, 120):  # the first comparison of each is cold, and the last is short once warm
        note_duration(progress, "comparing", num_pairs, 3, compare=compare, timed=(2, 6))
    assert shapes == [((2, 3), (6, 3))] * 13
    assert progress.notes == [
        "comparing: 61 pairs of vectors, about 10 s",
        "comparing: 60,000 pairs of vectors, about 3 hours",
    ]


@pytest.mark.parametrize(
    ("seconds", "duration"),
    [
        (11, "11 s"),
        (119, "119 s"),
        (120, "2 minutes"),
        (7199, "120 minutes"),
        (7200, "2 hours"),
        (36_000_000, "10000 hours"),
    ],
)
def test_durations_are_in_the_largest_unit(monkeypatch: pytest.MonkeyPatch, seconds: int, duration: str) -> None:
    clock, progress = count(), RecordedProgress()
    monkeypatch.setattr(durations.time, "perf_counter", lambda: next(clock))
    note_duration(progress, "x", seconds * 512 * 4096, 1, compare=lambda left, right: left)
    assert progress.notes == [f"x: {seconds * 2**21:,} pairs of vectors, about {duration}"]


@pytest.mark.parametrize(("total", "notes"), [(1000, ["x: 1,000 pairs of vectors, about 60 s"]), (100, [])])
def test_measured_duration_leaves_out_the_first_part(
    monkeypatch: pytest.MonkeyPatch, total: int, notes: list[str]
) -> None:
    clock, progress = [0.0], RecordedProgress()
    monkeypatch.setattr(durations.time, "perf_counter", lambda: clock[0])
    measured = MeasuredDuration(progress, "x", total)
    for seconds, num_pairs in ((9.0, 1), (0.3, 5), (0.3, 5), (30.0, 1)):  # 0.6 s for 10, once half a second is over
        clock[0] += seconds
        measured.add(num_pairs)
    assert progress.notes == notes


def test_short_comparison_is_not_announced() -> None:
    progress = RecordedProgress()
    note_duration(progress, "x", 6, 3, timed=(2, 3))
    assert progress.notes == []
