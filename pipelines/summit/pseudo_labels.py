"""Pseudo-labels from the predictions of two models that see the same points in different modalities.

Each function maps arrays to arrays; a label of -1 means that a point has none. The rules are those of "SUMMIT:
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

    The whole target training set is added chunk by chunk; memory does not grow with it.

    Args:
        num_classes: C.
        cap: highest threshold.
    """

    def __init__(self, num_classes: int, *, cap: float = 0.9) -> None:
        self._counts_CH: Ints = np.zeros((num_classes, _NUM_BINS), np.int64)
        self._cap = cap

    def add(self, prob_NC: Floats) -> "CertaintyThresholds":
        """Count the probabilities of some points, (N, C); return this object."""
        num_classes = len(self._counts_CH)
        predicted_N, value_N = prob_NC.argmax(axis=1), prob_NC.max(axis=1)
        bin_N = np.minimum(np.searchsorted(_EDGES, value_N, side="right") - 1, _NUM_BINS - 1)
        flat = np.bincount(predicted_N * _NUM_BINS + bin_N, minlength=num_classes * _NUM_BINS)
        self._counts_CH += flat.reshape(num_classes, _NUM_BINS)
        return self

    def thresholds(self) -> Array:
        """Return the threshold of each class: (C,) float64, the cap for a class that is never predicted.

        It is the lower edge of the bin with the lower median, so at least half of a class's points reach it.
        """
        totals_C = self._counts_CH.sum(axis=1)
        below_CH = np.cumsum(self._counts_CH, axis=1)
        bin_C = (2 * below_CH >= totals_C[:, None]).argmax(axis=1)
        edge_C = np.where(totals_C > 0, _EDGES[bin_C], 1.0)
        thresholds_C: Array = np.minimum(edge_C, self._cap)
        return thresholds_C


def keep_certain(prob_NC: Floats, thresholds_C: Array) -> Ints:
    """Return each point's most probable class if its probability reaches the threshold of that class, else -1.

    Example:
        >>> keep_certain(np.array([[0.9, 0.1], [0.4, 0.6]], np.float32), np.array([0.8, 0.8])).tolist()
        [0, -1]
    """
    predicted_N = prob_NC.argmax(axis=1)
    labels_N: Ints = np.where(prob_NC.max(axis=1) >= thresholds_C[predicted_N], predicted_N, IGNORED)
    return labels_N


def agree(labels_N: Ints, other_N: Ints) -> Ints:
    """Keep the labels that both modalities have in common (agreement filtering, AF), else -1."""
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

    The more certain modality gets the larger weight. `gap` and `other_gap` are ours: a weight is exp(-entropy - gap),
    so that a modality far from its source is trusted less.
    """
    log_weight_N2 = np.stack([-entropy(prob_NC) - gap, -entropy(other_NC) - other_gap], axis=1)
    weight_N2 = np.exp(log_weight_N2 - log_weight_N2.max(axis=1, keepdims=True))
    weight_N2 /= weight_N2.sum(axis=1, keepdims=True)
    fused_NC: Floats = (weight_N2[:, :1] * prob_NC + weight_N2[:, 1:] * other_NC).astype(np.float32)
    return fused_NC


class Gaussians(NamedTuple):
    """A normal distribution with independent channels per class.

    Args:
        mean_CD: (C, D) float64.
        variance_CD: (C, D) float64, above 0.
        count_C: (C,) number of points that each was fitted on; a class with fewer than 2 has no distribution.
    """

    mean_CD: Array
    variance_CD: Array
    count_C: Ints

    def log_density(self, features_ND: Floats, classes_N: Ints) -> Array:
        """Compute the log density of each point's features under the distribution of its class: (N,) float64.

        The sum over channels stays in logarithms: a product of 64 densities would under- or overflow.
        """
        variance_ND, features_ND = self.variance_CD[classes_N], features_ND.astype(np.float64)
        square_ND = (features_ND - self.mean_CD[classes_N]) ** 2 / variance_ND
        log_N: Array = -0.5 * (square_ND + np.log(2 * np.pi * variance_ND)).sum(axis=1)
        return log_N


def fit_gaussians(features_ND: Floats, labels_N: Ints, num_classes: int) -> Gaussians:
    """Fit one normal distribution per class to the features of the points that have a label.

    Variances are at least 1e-4 of the channel's variance over all these points: units that are always 0 for a class
    would otherwise decide alone.
    """
    is_kept_N = labels_N != IGNORED
    kept_ND, kept_N = features_ND[is_kept_N].astype(np.float64), labels_N[is_kept_N]
    count_C: Ints = np.bincount(kept_N, minlength=num_classes)
    mean_CD = np.zeros((num_classes, features_ND.shape[1]))
    variance_CD = np.ones_like(mean_CD)
    overall_D = kept_ND.var(axis=0) if len(kept_ND) else np.ones(features_ND.shape[1])
    floor_D = np.maximum(_VARIANCE_FLOOR * overall_D, np.finfo(np.float32).tiny)
    for number in np.flatnonzero(count_C > 1):
        rows = kept_ND[kept_N == number]
        mean_CD[number], variance_CD[number] = rows.mean(axis=0), np.maximum(rows.var(axis=0), floor_D)
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
    """Assign labels to points on which the modalities disagree, where a hypothesis test rejects one side only (HT).

    In the feature space of each modality, its own class is rejected if its density is at most k times that of the
    other modality's class. A point gets the class of the side that is not rejected if the other side is. Swapping the
    modalities changes nothing. Points whose two classes do not both have a distribution stay without a label.

    Args:
        labels_N: (N,) labels so far; only points with -1 change.
        first: one modality.
        second: the other modality.
        k: k near 0 rejects nothing, a large k rejects everything; both recover nothing.
    """
    is_open_N = (labels_N == IGNORED) & (first.predicted_N != second.predicted_N)
    for modality in (first, second):
        count_C = modality.gaussians.count_C
        is_open_N &= (count_C[first.predicted_N] > 1) & (count_C[second.predicted_N] > 1)
    rows = np.flatnonzero(is_open_N)
    own, other = first.predicted_N[rows], second.predicted_N[rows]
    rejects_first = _is_rejected(first, rows, own, other, k)
    rejects_second = _is_rejected(second, rows, other, own, k)
    recovered_N: Ints = np.array(labels_N, np.int64)
    recovered_N[rows[~rejects_first & rejects_second]] = own[~rejects_first & rejects_second]
    recovered_N[rows[rejects_first & ~rejects_second]] = other[rejects_first & ~rejects_second]
    return recovered_N


def _is_rejected(modality: ModalityPredictions, rows: Ints, own: Ints, other: Ints, k: float) -> Bools:
    features_MD = modality.features_ND[rows]
    own_M, other_M = (modality.gaussians.log_density(features_MD, classes) for classes in (own, other))
    is_rejected_M: Bools = own_M <= np.log(k) + other_M
    return is_rejected_M
