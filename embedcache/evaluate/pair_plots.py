"""Encoder pairs as figures, SVG text to be placed inside a page."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from embedcache.evaluate.pairs_report import PairFigures, PairsReport
from embedcache.metrics.intervals import Estimate
from embedcache.pages.figures import INK, svg

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
    lowest = min(0.0, shown.min())  # colours count from 0: a small difference looks small
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
