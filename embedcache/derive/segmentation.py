"""Rules of point segmentation: image features lifted to points, outputs of segmentation runs, and pseudo-labels.

    lift               patches of the image + `uv` of the points -> features of the points
    run                a run of the kind `points`: `image-prob`, `points-hidden`, …
    certain            probabilities -> labels (certainty filter, fitted on the training part)
    agree              labels of two modalities -> labels (AF)
    weight_by_entropy  probabilities of two modalities -> probabilities (EW)
    recover            labels, probabilities and penultimate features -> labels (HT, fitted on the training part)

The formulas are those of `embedcache.derive.pseudo_labels`. Labels are int16 with one column, -1 for none; derive them
with dtype `int16`. A rule of this file reads points of one cloud each, all with the same points in the same order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embedcache.arrays import Array, Ints
from embedcache.axis import Axis
from embedcache.dataset.links import sample_grid
from embedcache.derive.pseudo_labels import (
    CertaintyThresholds,
    Gaussians,
    ModalityPredictions,
    agree,
    fit_gaussians,
    keep_certain,
    recover_labels,
    weight_by_entropy,
)
from embedcache.derive.rules import Block, Output, Rule
from embedcache.encoders.base import ItemShape
from embedcache.errors import DataError, ItemError, SettingError
from embedcache.metrics.segmentation import IGNORED
from embedcache.store.cache import Cache


def lift_parameters(cache: Cache, patches: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of the rule `lift` for features of patches: where each grid lies in the image.

    Raises:
        SettingError: it is not known where the patches lie, as after a crop.
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


def _lift_outputs(shapes: Sequence[ItemShape], parameters: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    uv, *patches = shapes
    if uv != (-1, 2) or len(patches) != len(parameters["grids"]) or not patches:
        raise SettingError(
            f"the rule 'lift' takes uv, (-1, 2), and {len(parameters['grids'])} features of patches with their grids, "
            f"got inputs of the shapes {', '.join(map(str, shapes))}"
        )
    for shape, grid in zip(patches, parameters["grids"], strict=True):
        axis = Axis.from_json(grid)
        if len(shape) != 2 or axis.box is None or shape[0] != (axis.rows or 0) * (axis.columns or 0):
            raise SettingError(f"the rule 'lift': expected patches of the grid {grid}, got a feature of shape {shape}")
    return {"lifted": (-1, sum(shape[1] for shape in patches))}


def _lift(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    axes = [Axis.from_json(grid) for grid in parameters["grids"]]
    uv, *patches = (block.items() for block in inputs)
    lifted: list[Array | ItemError] = []
    for uv_N2, *grids in zip(uv, *patches, strict=True):
        if not np.isfinite(uv_N2).all():
            lifted.append(ItemError("NaN or infinity in uv"))
            continue
        parts = [sample_grid(values_TD, axis, uv_N2) for values_TD, axis in zip(grids, axes, strict=True)]
        lifted.append(np.concatenate(parts, axis=1))
    return {"lifted": lifted}


LIFT = Rule(name="lift", apply=_lift, outputs=_lift_outputs, parameters={"grids": []}, keeps_axis=True)
"""Features of image patches at the points that are projected into the image; inputs: `uv`, then the patches."""


def _label_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    _check_points("certain", shapes, 1)
    return {"label": (-1, 1)}


def _fit_certain(blocks: Iterator[Sequence[Block]], parameters: Mapping[str, Any]) -> dict[str, Array]:
    thresholds: CertaintyThresholds | None = None
    for (block,) in blocks:
        prob_NC = block.rows()
        thresholds = thresholds or CertaintyThresholds(prob_NC.shape[1], cap=parameters["cap"])
        thresholds.add(prob_NC)
    if thresholds is None:
        raise DataError("the rule 'certain': expected points in the training part, got none")
    return {"thresholds": thresholds.thresholds()}


def _certain(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    (block,) = inputs
    return {"label": block.with_rows(keep_certain(block.rows(), parameters["thresholds"])[:, None])}


CERTAIN = Rule(
    name="certain",
    apply=_certain,
    outputs=_label_outputs,
    parameters={"cap": 0.9},
    fit=_fit_certain,
    keeps_axis=True,
)
"""The most probable class of points above the median probability of that class, at most `cap`, in the training part."""


def _agree_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    _check_points("agree", shapes, 2, labels=(0, 1))
    return {"label": (-1, 1)}


def _agree(inputs: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
    first, second = inputs
    return {"label": first.with_rows(agree(_labels(first), _labels(second))[:, None])}


AGREE = Rule(name="agree", apply=_agree, outputs=_agree_outputs, parameters={}, keeps_axis=True)
"""The labels that two modalities have in common."""


def _weight_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    _check_points("weight_by_entropy", shapes, 2, probabilities=(0, 1))
    return {"prob": shapes[0]}


def _weight(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    first, second = inputs
    gaps = {"gap": parameters["gap"], "other_gap": parameters["other_gap"]}
    return {"prob": first.with_rows(weight_by_entropy(first.rows(), second.rows(), **gaps))}


WEIGHT_BY_ENTROPY = Rule(
    name="weight_by_entropy",
    apply=_weight,
    outputs=_weight_outputs,
    parameters={"gap": 0.0, "other_gap": 0.0},
    keeps_axis=True,
)
"""The probabilities of two modalities, averaged with weights exp(-entropy - gap)."""


def _recover_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    _check_points("recover", shapes, 5, labels=(0,), probabilities=(1, 3))
    return {"label": (-1, 1)}


def _fit_recover(blocks: Iterator[Sequence[Block]], _: Mapping[str, Any]) -> dict[str, Array]:
    """Fit the distributions of both modalities; the labeled points of the training part are in memory at once."""
    labels: list[Ints] = []
    kept: tuple[list[Array], list[Array]] = ([], [])
    num_classes = 0
    for label, first_prob, first_hidden, _second_prob, second_hidden in blocks:
        labels_N = _labels(label)
        num_classes = first_prob.values.shape[-1]
        is_kept_N = labels_N != IGNORED
        labels.append(labels_N[is_kept_N])
        for hidden, found in zip((first_hidden, second_hidden), kept, strict=True):
            found.append(hidden.values[is_kept_N])
    if not labels:
        raise DataError("the rule 'recover': expected points in the training part, got none")
    fitted: dict[str, Array] = {}
    for name, found in zip(("first", "second"), kept, strict=True):
        gaussians = fit_gaussians(np.concatenate(found), np.concatenate(labels), num_classes)
        fitted |= {f"{name}_mean": gaussians.mean_CD, f"{name}_variance": gaussians.variance_CD}
        fitted["count"] = gaussians.count_C
    return fitted


def _recover(inputs: Sequence[Block], parameters: Mapping[str, Any]) -> Mapping[str, Output]:
    label, *others = inputs
    modalities = [
        ModalityPredictions(
            hidden.rows(),
            prob.rows().argmax(axis=1),
            Gaussians(parameters[f"{name}_mean"], parameters[f"{name}_variance"], parameters["count"]),
        )
        for name, prob, hidden in (("first", others[0], others[1]), ("second", others[2], others[3]))
    ]
    return {"label": label.with_rows(recover_labels(_labels(label), *modalities, k=parameters["k"])[:, None])}


RECOVER = Rule(
    name="recover",
    apply=_recover,
    outputs=_recover_outputs,
    parameters={"k": 1.0},
    fit=_fit_recover,
    keeps_axis=True,
)
"""Labels for points without one on which two modalities disagree, by a hypothesis test in both feature spaces.

Inputs: labels; probabilities and penultimate features of one modality; the same of the other.
"""


def _labels(block: Block) -> Ints:
    labels_N: Ints = block.values[..., 0].reshape(-1).astype(np.int64)
    return labels_N


def _check_points(
    rule: str,
    shapes: Sequence[ItemShape],
    count: int,
    *,
    labels: Sequence[int] = (),
    probabilities: Sequence[int] = (),
) -> None:
    """Check that all inputs are of points; those of labels have one column, and those of probabilities as many."""
    if len(shapes) != count or any(len(shape) != 2 or shape[0] != -1 for shape in shapes):
        raise SettingError(
            f"the rule {rule!r} takes {count} feature(s) of points, got inputs of the shapes "
            f"{', '.join(map(str, shapes))}"
        )
    for number in labels:
        if shapes[number][1] != 1:
            raise SettingError(
                f"the rule {rule!r}: expected labels, one column, as input {number + 1}, got a feature of "
                f"{shapes[number][1]} columns"
            )
    widths = [shapes[number][1] for number in probabilities]
    if len(set(widths)) > 1:
        raise SettingError(
            f"the rule {rule!r}: expected probabilities of the same classes of both modalities, got "
            f"{' and '.join(map(str, widths))} classes"
        )
