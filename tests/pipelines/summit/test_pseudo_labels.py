"""Pseudo-labels and their measures."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from scipy.stats import multivariate_normal
from sklearn.metrics import confusion_matrix, jaccard_score

from pipelines.summit.metrics import bootstrap_iou_difference, class_iou, count_frames, mean_iou
from pipelines.summit.pseudo_labels import (
    CertaintyThresholds,
    ModalityPredictions,
    agree,
    entropy,
    fit_gaussians,
    keep_certain,
    recover_labels,
    weight_by_entropy,
)

C = 4


def random_probabilities(seed: int, num_points: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(num_points, C)) * 3
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


PROBABILITIES = st.builds(random_probabilities, st.integers(0, 10_000), st.integers(1, 60))


@given(PROBABILITIES, st.integers(1, 60))
def test_thresholds_match_median(prob: np.ndarray, cut: int) -> None:
    found = CertaintyThresholds(C).add(prob[:cut]).add(prob[cut:]).thresholds()
    predicted, value = prob.argmax(axis=1), prob.max(axis=1)
    for number in range(C):
        own = np.sort(value[predicted == number]).astype(np.float64)
        median = own[(len(own) - 1) // 2] if len(own) else 1.0
        assert median - 0.001 - 1e-9 <= found[number] <= median + 1e-9 or found[number] == 0.9 <= median
        assert found[number] <= 0.9
        kept = (keep_certain(prob, found) == number).sum()
        assert 2 * kept >= len(own)


def test_agree_keeps_common_labels() -> None:
    first, second = np.array([0, 1, -1, 2, -1]), np.array([0, 2, -1, -1, 1])
    assert agree(first, second).tolist() == agree(second, first).tolist() == [0, -1, -1, -1, -1]


@pytest.mark.slow
@given(PROBABILITIES, st.integers(0, 10_000))
def test_entropy_weighting_matches_definition(prob: np.ndarray, seed: int) -> None:
    other = random_probabilities(seed, len(prob))
    assert entropy(prob) == pytest.approx(scipy_entropy(prob.astype(np.float64), axis=1), abs=1e-5)
    w, v = (np.exp(-scipy_entropy(each, axis=1))[:, None] for each in (prob, other))
    expected = (w * prob + v * other) / (w + v)
    fused = weight_by_entropy(prob, other)
    assert fused == pytest.approx(expected, abs=1e-5)
    assert fused == pytest.approx(weight_by_entropy(other, prob), abs=1e-6)
    assert fused.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_entropy_weighting_trusts_the_certain_modality() -> None:
    certain, uncertain = np.array([[0.98, 0.02]], np.float32), np.array([[0.4, 0.6]], np.float32)
    fused = weight_by_entropy(certain, uncertain)[0, 0]
    assert fused > (0.98 + 0.4) / 2
    assert weight_by_entropy(certain, uncertain, gap=1)[0, 0] < fused  # far from its source, so trusted less
    assert weight_by_entropy(certain, uncertain, other_gap=1e4)[0, 0] == pytest.approx(0.98)
    assert entropy(np.array([[1.0, 0.0]], np.float32)).tolist() == [0]


def two_modalities(seed: int, num_points: int = 60) -> tuple[np.ndarray, ModalityPredictions, ModalityPredictions]:
    """Labels with gaps, and features of 3 and 5 channels around class means, with wrong predictions in both."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, C, num_points)
    labels = np.where(rng.random(num_points) < 0.5, truth, -1)
    modalities = []
    for width in (3, 5):
        features = (rng.normal(size=(C, width))[truth] * 2 + rng.normal(size=(num_points, width))).astype(np.float32)
        predicted = np.where(rng.random(num_points) < 0.6, truth, rng.integers(0, C, num_points))
        modalities.append(ModalityPredictions(features, predicted, fit_gaussians(features, labels, C)))
    return labels, modalities[0], modalities[1]


def recover_in_linear_space(
    labels: np.ndarray, first: ModalityPredictions, second: ModalityPredictions, k: float
) -> list[int]:
    """Recover labels point by point, with densities of scipy and not their logarithms."""
    recovered = []
    for row, label in enumerate(labels):
        a, b = first.predicted_N[row], second.predicted_N[row]
        fewest = min(modality.gaussians.count_C[[a, b]].min() for modality in (first, second))
        if label >= 0 or a == b or fewest < 2:
            recovered.append(int(label))
            continue

        def density(modality: ModalityPredictions, number: int, row: int = row) -> float:
            mean, variance = modality.gaussians.mean_CD[number], modality.gaussians.variance_CD[number]
            return float(multivariate_normal(mean, np.diag(variance)).pdf(modality.features_ND[row]))

        rejects_a = density(first, a) <= k * density(first, b)
        rejects_b = density(second, b) <= k * density(second, a)
        recovered.append(int({(False, True): a, (True, False): b}.get((rejects_a, rejects_b), -1)))
    return recovered


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 1.0, 3.0]))
def test_hypothesis_test_matches_densities(seed: int, k: float) -> None:
    labels, first, second = two_modalities(seed)
    assert recover_labels(labels, first, second, k=k).tolist() == recover_in_linear_space(labels, first, second, k)


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
