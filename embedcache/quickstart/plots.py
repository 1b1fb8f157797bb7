"""Curves and bars as SVG text, to be placed inside a page."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from embedcache.evaluate.report import Figures
from embedcache.evaluate.retrieval import WAYS

_COLOURS = ("#2563eb", "#0d9488", "#9333ea", "#ea580c")
_INK = "#52606d"


def curves(run_paths: Sequence[Path]) -> str:
    """Draw the training loss by step and the validation recall by epoch, one line a run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss_axes, recall_axes = figure.subplots(1, 2)
    for path, colour in zip(run_paths, _COLOURS, strict=False):
        lines = [json.loads(line) for line in (path / "losses.jsonl").read_text().splitlines()]
        losses = [line for line in lines if "loss" in line]
        recalls = [line for line in lines if "validation" in line]
        loss_axes.plot(
            [line["step"] for line in losses],
            [line["loss"] for line in losses],
            color=colour,
            label=path.name,
        )
        recall_axes.plot(
            [line["epoch"] for line in recalls],
            [_mean_recall(line["validation"]) for line in recalls],
            color=colour,
            marker=".",
            label=path.name,
        )
    _label(loss_axes, "step", "training loss")
    _label(recall_axes, "epoch; 0 is the closed form; mean of R@1, 5, 10", "validation recall")
    loss_axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure)


def recall_bars(rows: Mapping[str, Figures]) -> str:
    """Draw R@10 of each row both ways, with its interval."""
    figure = Figure(figsize=(9, 0.5 + 0.42 * len(rows)), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for position, (figures, colour) in enumerate(zip(rows.values(), _COLOURS, strict=False)):
            estimate = figures[way]["r@10"]
            axes.barh(position, estimate.value, color=colour, height=0.55)
            axes.plot([estimate.low, estimate.high], [position, position], color="#111827", linewidth=1.5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis() if way == WAYS[0] else None
        _label(axes, f"{way} R@10 with its 95 % interval", "")
    return _svg(figure)


def _mean_recall(recalls: Mapping[str, float]) -> float:
    return sum(recalls.values()) / len(recalls)


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(colors=_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
