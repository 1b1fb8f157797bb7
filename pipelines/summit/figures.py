"""Segmentation as figures: frames with their points colored by class."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from embedcache.arrays import Array, Floats, Ints
from embedcache.reports.figures import INK, legend_name, open_axes
from pipelines.summit.metrics import IGNORED

CLASS_COLORS = ("#804080", "#f423e8", "#6b8e23", "#8a8a8a", "#1f4bd8", "#dc143c", "#f5c400", "#00a6a6", "#8b4513")
"""Color of each class, in their order."""
_IGNORED_COLOR = "#ffffff"
_JPEG_QUALITY = 82


@dataclass(frozen=True, kw_only=True)
class FrameRow:
    """A frame, drawn once without points and once per panel.

    Args:
        title: text on the left.
        image: (H, W, 3) uint8.
        uv_N2: (N, 2) positions of the points as fractions of width and height.
        panels: name -> (N,) class of each point, such as the truth or predictions; -1 is white.
    """

    title: str
    image: Array
    uv_N2: Floats
    panels: dict[str, Ints]


def draw_frames(rows: Sequence[FrameRow], class_names: Sequence[str], *, width: float = 13.0) -> Figure:
    """Draw frames, one per row, and return the figure. The panels of all rows have the same names."""
    names = list(rows[0].panels)
    height_px, width_px = rows[0].image.shape[:2]
    panel_width = width / (len(names) + 1)
    height = len(rows) * panel_width * height_px / width_px + 0.2 * len(rows) + 0.6
    axes = open_axes(height, width=width, nrows=len(rows), ncols=len(names) + 1, squeeze=False)

    for row, frame in enumerate(rows):
        # As a JPEG first, because the noise of the rendering makes a PNG of megabytes.
        image = _compressed(frame.image)
        for column, name in enumerate(["image", *names]):
            panel = axes[row, column]

            # Pale and grey, the image stays in the background of its points.
            panel.imshow(image if name == "image" else image // 3 + 160, aspect="auto", interpolation="antialiased")
            if name != "image":
                _scatter(panel, frame, frame.panels[name])
            panel.set(xlim=(0, width_px), ylim=(height_px, 0), xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set_visible(False)
            if row == 0:
                panel.set_title(name, color=INK, fontsize=9)
        axes[row, 0].set_ylabel(frame.title, color=INK, fontsize=8)

    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=legend_name(name))
        for name, color in zip(class_names, CLASS_COLORS, strict=False)
    ]

    figure: Figure = axes[0, 0].figure
    figure.legend(handles=handles, frameon=False, labelcolor=INK, loc="outside lower center", ncols=len(class_names))
    return figure


def _scatter(panel: object, frame: FrameRow, classes_N: Ints) -> None:
    height_px, width_px = frame.image.shape[:2]
    palette = np.array([*CLASS_COLORS, _IGNORED_COLOR])
    colors = palette[np.where(classes_N == IGNORED, len(CLASS_COLORS), classes_N)]
    x = frame.uv_N2[:, 0] * width_px
    y = frame.uv_N2[:, 1] * height_px

    # Thousands of points as vectors would make a page of megabytes.
    panel.scatter(x, y, s=4.5, c=list(colors), linewidths=0, rasterized=True)  # type: ignore[attr-defined]


def _compressed(image: Array) -> Array:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return np.asarray(Image.open(buffer))
