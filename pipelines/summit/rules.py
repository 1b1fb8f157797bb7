"""Rules of point segmentation: image features lifted to points, and pseudo-labels from the outputs of runs.

    LIFT               patches of the image + `uv` of the points -> features of the points
    CERTAIN            probabilities -> labels (certainty filter, fitted on the training part)
    AGREE              labels of two modalities -> labels (AF)
    WEIGHT_BY_ENTROPY  probabilities of two modalities -> probabilities (EW)
    RECOVER            labels, probabilities and penultimate features -> labels (HT, fitted on the training part)

The formulas are in `pipelines.summit.pseudo_labels`. Labels are int16 with one column, -1 for none; derive them
with dtype `int16`. Each input of a rule is one cloud, and all inputs have the same points in the same order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Ints
from embedcache.derive.rules import Block, Output, Rule
from embedcache.encoders.base import ItemShape
from embedcache.errors import DataError, ItemError, SettingError
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from pipelines.summit.metrics import IGNORED
from pipelines.summit.pseudo_labels import (
    CertaintyThresholds,
    Gaussians,
    ModalityPredictions,
    agree,
    fit_gaussians,
    keep_certain,
    recover_labels,
    weight_by_entropy,
)


def lift_parameters(cache: Cache, patches: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of the rule `lift` for features of patches: the place of each grid in the image.

    Raises:
        SettingError: the place of the patches in the image is unknown, as after a crop.
    """
    grids = []
    for name in patches:
        axis = cache.feature("image", name).axis
        if axis is None or axis.kind != "grid" or axis.box is None:
            raise SettingError(
                f"{name}: expected patches whose place in the image is known, got a feature of an encoder that crops "
                "images or has no grid; encode whole images, such as lite:efficientnet-lite0,fit=448x224"
            )
        grids.append(axis.to_json())
    return {"grids": grids}


def _lift_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    patches = shapes[1:]
    return {"lifted": (-1, sum(shape[1] for shape in patches))}


def _lift(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    axes = [Axis(**grid) for grid in parameters["grids"]]
    uv, *patches = (block.items() for block in inputs)

    lifted: list[Array | ItemError] = []
    for uv_N2, *grids in zip(uv, *patches, strict=True):
        if not np.isfinite(uv_N2).all():
            lifted.append(ItemError("NaN or infinity in uv"))
            continue

        # Each layer has another grid, and all are sampled at the same points.
        parts = [sample_grid(values_TD, axis, uv_N2) for values_TD, axis in zip(grids, axes, strict=True)]
        lifted.append(np.concatenate(parts, axis=1))
    return {"lifted": lifted}


def sample_grid(values_TD: Array, axis: Axis, uv_N2: Array) -> Floats:
    """Interpolate a feature on a grid of an image bilinearly at places in the image: (N, D) float32.

    The value of a cell belongs to its center. Beyond the outermost centers, the nearest cell counts. The rule `lift`
    stores the result, so a reordering of the operations would change the bits of derived features.

    Args:
        values_TD: (T, D), one row per cell, row by row.
        axis: of kind grid; without a box it covers the whole image.
        uv_N2: (N, 2) fractions of the image's width and height.
    """
    assert axis.rows is not None  # both are checked by `Axis`
    assert axis.columns is not None
    x0, y0, x1, y1 = axis.box or (0.0, 0.0, 1.0, 1.0)

    corners = []
    for position_N, low, high, size in ((uv_N2[:, 1], y0, y1, axis.rows), (uv_N2[:, 0], x0, x1, axis.columns)):
        place_N = np.clip((position_N - low) / (high - low) * size - 0.5, 0, size - 1)
        cell_N = np.minimum(place_N.astype(np.int64), max(size - 2, 0))
        fraction_N1 = (place_N - cell_N).astype(np.float32)[:, None]
        corners.append((cell_N, np.minimum(cell_N + 1, size - 1), fraction_N1))

    (top, bottom, v_N1), (left, right, u_N1) = corners
    grid_HWD = np.asarray(values_TD, np.float32).reshape(axis.rows, axis.columns, -1)
    upper_ND = (1 - u_N1) * grid_HWD[top, left] + u_N1 * grid_HWD[top, right]
    lower_ND = (1 - u_N1) * grid_HWD[bottom, left] + u_N1 * grid_HWD[bottom, right]
    sampled_ND: Floats = ((1 - v_N1) * upper_ND + v_N1 * lower_ND).astype(np.float32)
    return sampled_ND


LIFT = Rule(name=f"{__name__}:LIFT", apply=_lift, outputs=_lift_outputs, parameters={"grids": []}, keeps_axis=True)
"""Features of image patches at the points that are projected into the image. Inputs are `uv`, then the patches."""


def _label_outputs(_: Sequence[ItemShape], __: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    return {"label": (-1, 1)}


def _fit_certain(blocks: Iterator[Sequence[Block]], parameters: Mapping[str, Any]) -> dict[str, Array]:
    thresholds: CertaintyThresholds | None = None
    for (block,) in blocks:
        prob_NC = block.rows()
        thresholds = thresholds or CertaintyThresholds(prob_NC.shape[1], cap=parameters["cap"])
        thresholds.add(prob_NC)

    if thresholds is None:
        raise DataError("expected points in the training part, got none")
    return {"thresholds": thresholds.thresholds()}


def _certain(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    (block,) = inputs
    return {"label": block.with_rows(keep_certain(block.rows(), parameters["thresholds"])[:, None])}


CERTAIN = Rule(
    name=f"{__name__}:CERTAIN",
    apply=_certain,
    outputs=_label_outputs,
    parameters={"cap": 0.9},
    fit=_fit_certain,
    keeps_axis=True,
)
"""The most probable class of points above the median probability of that class, at most `cap`, in the training part."""


def _agree(inputs: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
    first, second = inputs
    return {"label": first.with_rows(agree(_labels(first), _labels(second))[:, None])}


AGREE = Rule(name=f"{__name__}:AGREE", apply=_agree, outputs=_label_outputs, parameters={}, keeps_axis=True)
"""The labels on which two modalities agree."""


def _weight_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    return {"prob": shapes[0]}


def _weight(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    first, second = inputs
    gaps = {"gap": parameters["gap"], "other_gap": parameters["other_gap"]}
    return {"prob": first.with_rows(weight_by_entropy(first.rows(), second.rows(), **gaps))}


WEIGHT_BY_ENTROPY = Rule(
    name=f"{__name__}:WEIGHT_BY_ENTROPY",
    apply=_weight,
    outputs=_weight_outputs,
    parameters={"gap": 0.0, "other_gap": 0.0},
    keeps_axis=True,
)
"""The probabilities of two modalities, averaged with weights exp(-entropy - gap)."""


def _fit_recover(blocks: Iterator[Sequence[Block]], _: Mapping[str, Any]) -> dict[str, Array]:
    """Fit the distributions of both modalities. The labeled points of the training part are in memory together."""
    labels: list[Ints] = []
    first_parts: list[Array] = []
    second_parts: list[Array] = []
    num_classes = 0
    for label, first_prob, first_hidden, _second_prob, second_hidden in blocks:
        labels_N = _labels(label)
        num_classes = first_prob.values.shape[-1]

        # Only labeled points are kept, which are a part of all points.
        is_labeled_N = labels_N != IGNORED
        labels.append(labels_N[is_labeled_N])
        first_parts.append(first_hidden.values[is_labeled_N])
        second_parts.append(second_hidden.values[is_labeled_N])
    if not labels:
        raise DataError("expected points in the training part, got none")

    fitted: dict[str, Array] = {}
    for name, parts in (("first", first_parts), ("second", second_parts)):
        gaussians = fit_gaussians(np.concatenate(parts), np.concatenate(labels), num_classes)
        fitted |= {f"{name}_mean": gaussians.mean_CD, f"{name}_variance": gaussians.variance_CD}
        fitted["count"] = gaussians.count_C
    return fitted


def _recover(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    label, *predictions = inputs
    modalities = [
        ModalityPredictions(
            hidden.rows(),
            prob.rows().argmax(axis=1),
            Gaussians(parameters[f"{name}_mean"], parameters[f"{name}_variance"], parameters["count"]),
        )
        for name, prob, hidden in (
            ("first", predictions[0], predictions[1]),
            ("second", predictions[2], predictions[3]),
        )
    ]
    return {"label": label.with_rows(recover_labels(_labels(label), *modalities, k=parameters["k"])[:, None])}


RECOVER = Rule(
    name=f"{__name__}:RECOVER",
    apply=_recover,
    outputs=_label_outputs,
    parameters={"k": 1.0},
    fit=_fit_recover,
    keeps_axis=True,
)
"""Labels for points without one on which two modalities disagree, by a hypothesis test in both feature spaces.

Inputs are labels, then probabilities and penultimate features of one modality, then the same of the other modality.
"""


def _labels(block: Block) -> Ints:
    labels_N: Ints = block.values[..., 0].reshape(-1).astype(np.int64)
    return labels_N
