"""Curves and bars as SVG text, to be placed inside a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from embedcache.pages.figures import COLOURS, INK, label, svg


def curves(run_paths: Sequence[Path]) -> str:
    """Draw the training loss by step and the validation recall by epoch, one line a run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss_axes, recall_axes = figure.subplots(1, 2)
    for path, colour in zip(run_paths, COLOURS, strict=False):
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
    label(loss_axes, "step", "training loss")
    label(recall_axes, "epoch; 0 is the closed form; mean of R@1, 5, 10", "validation recall")
    loss_axes.legend(frameon=False, labelcolor=INK)
    return svg(figure)


def _mean_recall(recalls: Mapping[str, float]) -> float:
    return sum(recalls.values()) / len(recalls)
