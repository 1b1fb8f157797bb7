"""The presentation of a comparison of encoder pairs: a table, and a heat map per metric."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from embedcache.evaluate.encoder_pairs import METRICS, PairMetrics, PairsReport
from embedcache.metrics import Estimate
from embedcache.reports.figures import INK, open_axes, svg
from embedcache.reports.render import Presentation, Section, Table, format_fraction

_NOTES = {
    "probe": "Recall at 10, mean of both directions, of a CCA fitted on the training part that ranks the validation "
    "part: the initialization of training, and the only one of these metrics that learns a map.",
    "mutual_knn": "The fraction of a sample's nearest neighbors that both features share (The Platonic Representation "
    "Hypothesis, ICML 2024). It depends on k and on the number of samples.",
    "debiased_cka": "Linear CKA from unbiased estimates: 0 for features that have nothing in common, whatever their "
    "width and number, with which CKA as it is usually reported grows.",
}


def encoder_pairs_table(report: PairsReport) -> Table:
    """Return all metrics with their 95% intervals: one row per pair, best probe first, and a last row for chance."""
    rows = []
    for pair in report.pairs:
        estimates = (*pair.recalls.values(), pair.mutual_knn, pair.debiased_cka)
        rows.append([" × ".join(pair.features.values()), *map(str, estimates)])

    # The expected debiased CKA of unrelated features is 0.
    chance = [*map(str, report.chance.values()), format_fraction(report.knn_chance), format_fraction(0.0)]
    rows.append(["chance", *chance])

    probes = map("probe {} R@10".format, report.chance)
    return [" × ".join(report.pairs[0].features), *probes, "mutual kNN", "debiased CKA"], rows


def encoder_pairs_json(report: PairsReport) -> dict[str, Any]:
    """Return all fields of a report as JSON values, and `rows`: how a sample becomes one row.

    A pair has its features by modality, such as `image` and `text`, and the recalls of its probe, such as `i2t`.
    """
    values = asdict(report)
    pairs = []
    for pair in values["pairs"]:
        features = pair.pop("features")
        recalls = pair.pop("recalls")
        pairs.append({**features, **recalls, **pair})
    return {**values, "pairs": pairs, "rows": report.rows, "centred": True}


def present_encoder_pairs(report: PairsReport) -> Presentation:
    """Return the presentation of a comparison, with one heat map per metric."""
    sections = [Section(title="All pairs, best probe first", table=encoder_pairs_table(report))]
    for metric, name in METRICS.items():
        sections.append(Section(title=name, notes=[_NOTES[metric]], figures=partial(_heat_maps, report, metric)))
    return Presentation(
        title="Encoder pairs",
        lines=report.lines(),
        warnings=report.skipped,
        sections=sections,
        record=lambda: {"pairs": encoder_pairs_json(report)},
    )


_DARKEST = 0.6  # of the shades, so that dark text is readable on all of them


def _heat_maps(report: PairsReport, metric: str) -> list[str]:
    """Draw one of `METRICS` as an SVG element: one row per feature of the first modality, one column per other one.

    Both are in order of their mean probe, best first, so that the heat maps of all metrics have the same layout.
    """
    first_names, second_names = (_by_probe(report.pairs, modality) for modality in report.pairs[0].features)
    values = np.empty((len(first_names), len(second_names)))
    intervals = np.empty(values.shape, object)
    for pair in report.pairs:
        first, second = pair.features.values()
        cell = first_names.index(first), second_names.index(second)
        values[cell] = pair.value(metric)
        intervals[cell] = _interval(pair, metric)

    # Colors start at 0, so that a small difference looks small.
    axes = open_axes(0.9 + 0.55 * len(first_names), width=2.6 + 1.35 * len(second_names))
    lowest = min(0.0, values.min())
    darkest = lowest + (values.max() - lowest) / _DARKEST
    axes.imshow(values, cmap="Blues", vmin=lowest, vmax=darkest, aspect="auto")

    centered: dict[str, Any] = {"ha": "center", "va": "center", "color": "#1f2933"}
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row - 0.12, format_fraction(value), **centered)
        axes.text(column, row + 0.25, intervals[row, column], fontsize=7, **centered)

    axes.set_xticks(range(len(second_names)), list(map(_break_name, second_names)), fontsize=8)
    axes.set_yticks(range(len(first_names)), list(map(_break_name, first_names)), fontsize=8)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    return [svg(axes.figure)]


def _break_name(feature: str) -> str:
    """Return the name of a feature in two lines, encoder and feature."""
    return feature.replace("/", "/\n", 1)


def _by_probe(pairs: Sequence[PairMetrics], modality: str) -> list[str]:
    """Return the features of a modality in order of their mean probe, best first."""
    probes = defaultdict(list)
    for pair in pairs:
        probes[pair.features[modality]].append(pair.probe)
    return sorted(probes, key=lambda name: -np.mean(probes[name]))


def _interval(pair: PairMetrics, metric: str) -> str:
    """Return the interval of a metric. The probe has none, so return the value of each direction."""
    estimate = getattr(pair, metric)
    if isinstance(estimate, Estimate):
        return f"[{format_fraction(estimate.low)}, {format_fraction(estimate.high)}]"
    return ", ".join(f"{direction} {format_fraction(recall.value)}" for direction, recall in pair.recalls.items())
