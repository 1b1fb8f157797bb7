import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from pipelines.summit.metrics import (
    bootstrap_iou_difference,
    class_iou,
    count_frames,
    mean_iou,
)

NUM_CLASSES = 4


@st.composite
def frames(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels with -1, predictions, and lengths of frames, some of them empty; classes may be absent."""
    lengths = np.array(draw(st.lists(st.integers(0, 30), min_size=1, max_size=5)))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    num_used = draw(st.integers(1, NUM_CLASSES))
    return rng.integers(-1, num_used, lengths.sum()), rng.integers(0, num_used, lengths.sum()), lengths


@pytest.mark.slow
@given(frames())
def test_iou_matches_sklearn(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, predicted, lengths = problem
    counts = count_frames(labels, predicted, lengths, NUM_CLASSES)
    starts = np.cumsum(lengths) - lengths
    for frame, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        rows = slice(start, start + length)
        known = labels[rows] >= 0
        if known.any():
            expected = confusion_matrix(labels[rows][known], predicted[rows][known], labels=range(NUM_CLASSES))
            assert np.array_equal(counts[frame], expected)
        else:
            assert not counts[frame].any()
    known = labels >= 0
    found = np.union1d(labels[known], predicted[known])
    iou = class_iou(counts.sum(axis=0))
    assert set(np.flatnonzero(~np.isnan(iou))) == set(found)
    if known.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = jaccard_score(labels[known], predicted[known], labels=found, average=None, zero_division=0)
        assert iou[found] == pytest.approx(expected)
        assert mean_iou(counts.sum(axis=0)) == pytest.approx(expected.mean())
    else:
        assert np.isnan(mean_iou(counts.sum(axis=0)))


def random_frames(seed: int, num_frames: int, error: float) -> np.ndarray:
    """Counts of frames with 200 points each, of which about `error` are wrong; frames differ in difficulty."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, 200 * num_frames)
    is_wrong = rng.random(len(labels)) < np.repeat(rng.uniform(0, 2 * error, num_frames), 200)
    predicted = np.where(is_wrong, rng.integers(0, NUM_CLASSES, len(labels)), labels)
    return count_frames(labels, predicted, np.full(num_frames, 200), NUM_CLASSES)


def test_difference_is_paired() -> None:
    labels = np.random.default_rng(0).integers(0, NUM_CLASSES, 2000)
    worse, better = labels.copy(), labels.copy()
    worse[::4], better[::5] = (worse[::4] + 1) % NUM_CLASSES, (better[::5] + 1) % NUM_CLASSES
    lengths = np.full(10, 200)
    base, counts = (count_frames(labels, each, lengths, NUM_CLASSES) for each in (worse, better))
    same, difference = bootstrap_iou_difference(base, base), bootstrap_iou_difference(counts, base)
    assert (same.low, same.high) == (0, 0)
    assert 0 < difference.low < difference.value < difference.high


@pytest.mark.slow
def test_frames_are_drawn_1000_times_from_seed_0() -> None:
    counts, base = random_frames(0, 9, 0.3), random_frames(0, 9, 0.2)
    drawn = np.random.default_rng(0).integers(9, size=(1000, 9))
    values = [[mean_iou(each[rows].sum(axis=0)) for each in (counts, base)] for rows in drawn]
    found = bootstrap_iou_difference(counts, base)
    differences = [own - other for own, other in values]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
