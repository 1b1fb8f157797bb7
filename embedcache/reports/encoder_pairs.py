"""Encoder pairs side by side: what was measured of each, and what decided it.

Encoder pairs as a page: the table, a heat map for each metric, and what decided the figures.

Encoder pairs as figures, SVG text to be placed inside a page.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from embedcache.evaluate.encoder_pairs import METRICS, ROWS, PairFigures, PairsReport
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import INK, Section, svg, write_sections
from embedcache.reports.retrieval import format_estimate, format_share


def pairs_rows(report: PairsReport) -> tuple[list[str], list[list[str]]]:
    """Lay a report out as a table: a row a pair, the best probe first, and a last row of what chance gives.

    Returns:
        The column names, and the rows of text: `value [low, high]`.
    """
    columns = ["image × text", "probe i2t R@10", "probe t2i R@10", "mutual kNN", "debiased CKA", "linear CKA"]
    columns.append("shuffled")
    rows = [[f"{pair.image} × {pair.text}", *_cells(pair)] for pair in report.pairs]
    chance = [format_estimate(report.chance[way]) for way in ("i2t", "t2i")]
    return columns, [*rows, ["chance", *chance, format_share(report.knn_chance), format_share(0.0), "as shuffled", ""]]


def pairs_json(report: PairsReport) -> dict[str, Any]:
    """Give a report as JSON values: all its fields, and `rows`, how a sample became a row; estimates with intervals."""
    return {**asdict(report), "rows": ROWS, "centred": True}


def _cells(pair: PairFigures) -> list[str]:
    estimates = (pair.i2t, pair.t2i, pair.mutual_knn, pair.debiased_cka, pair.linear_cka)
    return [*(format_estimate(estimate) for estimate in estimates), format_share(pair.shuffled_cka)]


_NOTES = {
    "probe": "Recall at 10, mean of both ways, of a CCA that was fitted on the training part and ranks the validation "
    "part: the start of training, and the only one of these that learns a map.",
    "mutual_knn": "The share of a sample's nearest neighbors that both sides agree on (The Platonic Representation "
    "Hypothesis, ICML 2024). It depends on k and on the number of samples.",
    "debiased_cka": "Linear CKA from unbiased estimates: 0 for sides that have nothing in common, whatever their "
    "width.",
    "linear_cka": "CKA as it is mostly reported. It grows with the width of the features over the number of samples; "
    "the column 'shuffled' of the table is how much of it would be there with shuffled pairs.",
}


def write_pairs(path: Path, report: PairsReport) -> None:
    """Write the page. It asks for nothing from outside."""
    best = report.pairs[0]
    maps = [
        Section(title=name, notes=[_NOTES[metric]], figures=[heat_map(report, metric)])
        for metric, name in METRICS.items()
    ]
    pooling = [[feature, words] for feature, words in report.pooling.items()]
    sections = [
        Section(title="All pairs, best probe first", notes=[report.line()], table=pairs_rows(report)),
        *maps,
        Section(title="How each encoder made its vectors", table=(["feature", "pooling"], pooling)),
    ]
    write_sections(
        path,
        title="Encoder pairs",
        lead=f"Before any training: {best.image} × {best.text} has the best probe, R@10 {best.probe:.3f}, of "
        f"{len(report.pairs)} pairs.",
        warnings=list(report.skipped),
        sections=sections,
    )


_SHADES = colormaps["Blues"]
_DARKEST = 0.6  # of the shades, so that dark letters can be read on all
_LETTERS = "#1f2933"


def heat_map(report: PairsReport, metric: str) -> str:
    """Draw one of `METRICS`: an image feature a row, a text feature a column, with the numbers in the cells.

    Both are in order of their mean probe, best first, so that all metrics are laid out alike.
    """
    images = _by_probe(report.pairs, lambda pair: pair.image)
    texts = _by_probe(report.pairs, lambda pair: pair.text)
    figure = Figure(figsize=(2.6 + 1.35 * len(texts), 0.9 + 0.55 * len(images)), layout="constrained")
    axes = figure.subplots()
    values = {(pair.image, pair.text): pair for pair in report.pairs}
    shown = np.array([[values[image, text].value(metric) for text in texts] for image in images])
    lowest = min(0.0, shown.min())  # colors count from 0: a small difference looks small
    scale = Normalize(lowest, lowest + (shown.max() - lowest) / _DARKEST)
    axes.imshow(shown, cmap=_SHADES, norm=scale, aspect="auto")
    for row, image in enumerate(images):
        for column, text in enumerate(texts):
            axes.text(column, row - 0.12, f"{shown[row, column]:.3f}", ha="center", va="center", color=_LETTERS)
            interval = _interval(values[image, text], metric)
            axes.text(column, row + 0.25, interval, ha="center", va="center", color=_LETTERS, fontsize=7)
    axes.set_xticks(range(len(texts)), [text.replace("/", "/\n", 1) for text in texts], fontsize=8)
    axes.set_yticks(range(len(images)), [image.replace("/", "/\n", 1) for image in images], fontsize=8)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    return svg(figure)


def _by_probe(pairs: Sequence[PairFigures], name: Callable[[PairFigures], str]) -> list[str]:
    means = {one: np.mean([pair.probe for pair in pairs if name(pair) == one]) for one in map(name, pairs)}
    return sorted(means, key=lambda one: -means[one])


def _interval(pair: PairFigures, metric: str) -> str:
    found = getattr(pair, metric)
    return f"{found.low:.3f} to {found.high:.3f}" if isinstance(found, Estimate) else _both_ways(pair)


def _both_ways(pair: PairFigures) -> str:
    return f"i2t {pair.i2t.value:.3f}, t2i {pair.t2i.value:.3f}"
