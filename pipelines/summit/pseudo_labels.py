"""Pseudo-labels from the predictions of two models that see the same points in different modalities.

Each function maps arrays to arrays. A label of -1 means that a point has no label. The rules are those of "SUMMIT:
Source-Free Adaptation of Uni-Modal Models to Multi-Modal Targets" (ICCV 2023), from its published code, with two
corrections: entropy weighting trusts the model that is more certain, and the hypothesis test treats both modalities
alike, on logarithms of densities.

    1. `CertaintyThresholds`: per class, the median probability of the points predicted as that class, at most 0.9
    2. `agree` (AF) or `weight_by_entropy` (EW): one label from two predictions
    3. `fit_gaussians` and `recover_labels` (HT): labels for points that step 2 left out
"""

from typing import NamedTuple

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints
from pipelines.summit.metrics import IGNORED

_NUM_BINS = 1000
_EDGES = np.arange(_NUM_BINS + 1) / _NUM_BINS
_VARIANCE_FLOOR = 1e-4  # of a channel's variance over all classes


class CertaintyThresholds:
    """Median probability of the points predicted as each class, from a histogram of 1000 bins.

    The whole target training set is added chunk by chunk; memory does not grow with its size.

    Args:
        num_classes: C.
        cap: highest threshold.
    """

    def __init__(self, num_classes: int, *, cap: float = 0.9) -> None:
        self._counts_CH: Ints = np.zeros((num_classes, _NUM_BINS), np.int64)
        self._cap = cap

    def add(self, prob_NC: Floats) -> "CertaintyThresholds":
        """Count the probabilities of some points, (N, C), and return this object."""
        num_classes = len(self._counts_CH)
        predicted_N = prob_NC.argmax(axis=1)
        value_N = prob_NC.max(axis=1)

        # A probability of exactly 1 belongs to the last bin.
        bin_N = np.minimum(np.searchsorted(_EDGES, value_N, side="right") - 1, _NUM_BINS - 1)
        flat = np.bincount(predicted_N * _NUM_BINS + bin_N, minlength=num_classes * _NUM_BINS)
        self._counts_CH += flat.reshape(num_classes, _NUM_BINS)
        return self

    def thresholds(self) -> Array:
        """Return the threshold of each class, (C,) float64. A class that is never predicted has the cap.

        A threshold is the lower edge of the bin with the lower median, so at least half of a class's points reach it.
        """
        totals_C = self._counts_CH.sum(axis=1)
        cumulative_CH = np.cumsum(self._counts_CH, axis=1)
        bin_C = (2 * cumulative_CH >= totals_C[:, None]).argmax(axis=1)
        edge_C = np.where(totals_C > 0, _EDGES[bin_C], 1.0)
        thresholds_C: Array = np.minimum(edge_C, self._cap)
        return thresholds_C


def keep_certain(prob_NC: Floats, thresholds_C: Array) -> Ints:
    """Return each point's most probable class if its probability reaches the threshold of that class, or else -1.

    Example:
        >>> keep_certain(np.array([[0.9, 0.1], [0.4, 0.6]], np.float32), np.array([0.8, 0.8])).tolist()
        [0, -1]
    """
    predicted_N = prob_NC.argmax(axis=1)
    labels_N: Ints = np.where(prob_NC.max(axis=1) >= thresholds_C[predicted_N], predicted_N, IGNORED)
    return labels_N


def agree(labels_N: Ints, other_N: Ints) -> Ints:
    """Keep the labels on which both modalities agree (agreement filtering, AF); others become -1."""
    common_N: Ints = np.where(labels_N == other_N, labels_N, IGNORED)
    return common_N


def entropy(prob_NC: Floats) -> Array:
    """Compute the entropy of each row of probabilities in nats: (N,) float64, from 0 to log C."""
    prob = prob_NC.astype(np.float64)
    logs = np.log(prob, out=np.zeros_like(prob), where=prob > 0)  # 0 log 0 = 0
    entropy_N: Array = -(prob * logs).sum(axis=1)
    return entropy_N


def weight_by_entropy(prob_NC: Floats, other_NC: Floats, *, gap: float = 0.0, other_gap: float = 0.0) -> Floats:
    """Average the probabilities of two modalities with weights exp(-entropy) (entropy weighting, EW): (N, C) float32.

    The more certain modality gets the larger weight. `gap` and `other_gap` are our addition: a weight is
    exp(-entropy - gap), so that a modality far from its source counts less.
    """
    log_weight_N2 = np.stack([-entropy(prob_NC) - gap, -entropy(other_NC) - other_gap], axis=1)

    # Subtracting the maximum keeps the exponentials away from 0 when both entropies or gaps are large.
    weight_N2 = np.exp(log_weight_N2 - log_weight_N2.max(axis=1, keepdims=True))
    weight_N2 /= weight_N2.sum(axis=1, keepdims=True)
    fused_NC: Floats = (weight_N2[:, :1] * prob_NC + weight_N2[:, 1:] * other_NC).astype(np.float32)
    return fused_NC


class Gaussians(NamedTuple):
    """A normal distribution with independent channels per class.

    Args:
        mean_CD: (C, D) float64.
        variance_CD: (C, D) float64, above 0.
        count_C: (C,) number of points of each fit. A class with fewer than 2 has no distribution.
    """

    mean_CD: Array
    variance_CD: Array
    count_C: Ints

    def log_density(self, features_ND: Floats, classes_N: Ints) -> Array:
        """Compute the log density of each point's features under the distribution of its class: (N,) float64.

        The sum over channels stays in logarithms, because a product of 64 densities would under- or overflow.
        """
        features_ND = features_ND.astype(np.float64)
        variance_ND = self.variance_CD[classes_N]
        square_ND = (features_ND - self.mean_CD[classes_N]) ** 2 / variance_ND
        log_N: Array = -0.5 * (square_ND + np.log(2 * np.pi * variance_ND)).sum(axis=1)
        return log_N


def fit_gaussians(features_ND: Floats, labels_N: Ints, num_classes: int) -> Gaussians:
    """Fit one normal distribution per class to the features of the points that have a label.

    Variances are at least 1e-4 of the channel's variance over all these points. Otherwise units that are always 0 for a
    class would decide the result.
    """
    is_labeled_N = labels_N != IGNORED
    labeled_ND = features_ND[is_labeled_N].astype(np.float64)
    class_N = labels_N[is_labeled_N]
    count_C: Ints = np.bincount(class_N, minlength=num_classes)

    mean_CD = np.zeros((num_classes, features_ND.shape[1]))
    variance_CD = np.ones_like(mean_CD)

    # Without labeled points nothing is fitted below, and the floor is not used.
    overall_D = labeled_ND.var(axis=0) if len(labeled_ND) else np.ones(features_ND.shape[1])
    floor_D = np.maximum(_VARIANCE_FLOOR * overall_D, np.finfo(np.float32).tiny)
    for number in np.flatnonzero(count_C > 1):
        rows = labeled_ND[class_N == number]
        mean_CD[number] = rows.mean(axis=0)
        variance_CD[number] = np.maximum(rows.var(axis=0), floor_D)
    return Gaussians(mean_CD, variance_CD, count_C)


class ModalityPredictions(NamedTuple):
    """Features and predicted classes of N points by one modality.

    Args:
        features_ND: (N, D) penultimate features of the target.
        predicted_N: (N,) most probable class.
        gaussians: distributions of `features_ND` per class.
    """

    features_ND: Floats
    predicted_N: Ints
    gaussians: Gaussians


def recover_labels(labels_N: Ints, first: ModalityPredictions, second: ModalityPredictions, *, k: float = 1.0) -> Ints:
    """Label points on which the modalities disagree if a hypothesis test rejects the class of only one of them (HT).

    In the feature space of each modality, its predicted class is rejected if its density is at most k times the density
    of the other modality's class. If one class is rejected, the point gets the other one. Swapping the modalities
    changes nothing. Points stay without a label unless both classes have a distribution in both modalities.

    Args:
        labels_N: (N,) labels so far; only points with -1 change.
        first: one modality.
        second: the other modality.
        k: k near 0 rejects nothing, a large k rejects everything; both recover nothing.
    """
    # A test needs both densities: of the two classes, in both feature spaces.
    is_open_N = (labels_N == IGNORED) & (first.predicted_N != second.predicted_N)
    for modality in (first, second):
        count_C = modality.gaussians.count_C
        is_open_N &= (count_C[first.predicted_N] > 1) & (count_C[second.predicted_N] > 1)
    rows = np.flatnonzero(is_open_N)

    first_M = first.predicted_N[rows]
    second_M = second.predicted_N[rows]
    rejects_first_M = _is_rejected(first, rows, first_M, second_M, k)
    rejects_second_M = _is_rejected(second, rows, second_M, first_M, k)
    is_first_M = ~rejects_first_M & rejects_second_M
    is_second_M = rejects_first_M & ~rejects_second_M

    recovered_N: Ints = np.array(labels_N, np.int64)
    recovered_N[rows[is_first_M]] = first_M[is_first_M]
    recovered_N[rows[is_second_M]] = second_M[is_second_M]
    return recovered_N


def _is_rejected(modality: ModalityPredictions, rows: Ints, predicted_M: Ints, alternative_M: Ints, k: float) -> Bools:
    features_MD = modality.features_ND[rows]
    log_predicted_M = modality.gaussians.log_density(features_MD, predicted_M)
    log_alternative_M = modality.gaussians.log_density(features_MD, alternative_M)
    is_rejected_M: Bools = log_predicted_M <= np.log(k) + log_alternative_M
    return is_rejected_M
