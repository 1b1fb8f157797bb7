"""Metrics of segmentation: confusion counts per frame, and intersection over union (IoU) with intervals over frames.

A frame is one image or point cloud. Its pixels or points are not independent, so whole frames are resampled. Points
whose label is -1 are not counted.
"""

import numpy as np

from embedcache.arrays import Array, Floats, Ints
from embedcache.metrics import Estimate, bootstrap

IGNORED = -1
"""Label of a point without a class."""


def count_frames(labels_N: Ints, predicted_N: Ints, lengths_G: Ints, num_classes: int) -> Ints:
    """Count the points of each frame by true class (rows) and predicted class (columns): (G, C, C) int64.

    Args:
        labels_N: (N,) int, true class of each point, frame by frame; -1 is not counted.
        predicted_N: (N,) int, predicted class, from 0.
        lengths_G: (G,) int, number of points of each frame.
        num_classes: C.

    Example:
        >>> count_frames(np.array([0, 1, -1]), np.array([0, 0, 1]), np.array([2, 1]), 2).tolist()
        [[[1, 0], [1, 0]], [[0, 0], [0, 0]]]
    """
    frame_N = np.repeat(np.arange(len(lengths_G)), lengths_G)
    is_labeled_N = labels_N != IGNORED
    true = labels_N[is_labeled_N].astype(np.int64)
    predicted = predicted_N[is_labeled_N].astype(np.int64)

    # One number for each frame, true class and predicted class, so that one `bincount` counts all frames.
    flat = (frame_N[is_labeled_N] * num_classes + true) * num_classes + predicted
    counts: Ints = np.bincount(flat, minlength=len(lengths_G) * num_classes**2)
    return counts.reshape(len(lengths_G), num_classes, num_classes)


def class_iou(confusion_CC: Array) -> Array:
    """Compute the intersection over union of each class: (C,) float64.

    NaN for a class that is neither among the labels nor among the predictions.

    Example:
        >>> class_iou(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])).round(3).tolist()
        [0.75, 0.8, nan]
    """
    intersection_C = np.diagonal(confusion_CC).astype(np.float64)
    union_C = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1) - intersection_C
    iou_C: Array = np.divide(intersection_C, union_C, out=np.full(len(union_C), np.nan), where=union_C > 0)
    return iou_C


def mean_iou(confusion_CC: Array) -> float:
    """Compute the mean IoU over the classes among the labels or predictions (NaN if there are none)."""
    iou_C = class_iou(confusion_CC)
    is_present_C = ~np.isnan(iou_C)
    return float(iou_C[is_present_C].mean()) if is_present_C.any() else float("nan")


def bootstrap_iou_difference(counts_GCC: Ints, base_GCC: Ints, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Compute the difference of the mean IoUs of two predictions for the same frames.

    Both are computed on the same resamples of frames, so the interval belongs to the paired difference.
    """

    def difference(weights_G: Array) -> float:
        return mean_iou(_weighted(counts_GCC, weights_G)) - mean_iou(_weighted(base_GCC, weights_G))

    return bootstrap(difference, len(counts_GCC), num_draws=num_draws, seed=seed)


def predict_together(*probabilities_NC: Floats) -> Ints:
    """Predict the class with the highest sum of the probabilities of several models: (N,) int64."""
    total_NC: Array = np.sum([prob_NC.astype(np.float32) for prob_NC in probabilities_NC], axis=0)
    predicted_N: Ints = total_NC.argmax(axis=1)
    return predicted_N


def _weighted(counts_GCC: Ints, weights_G: Array) -> Array:
    weighted_CC: Array = np.tensordot(weights_G, counts_GCC, axes=1)
    return weighted_CC
