"""Speech recognition as figures: error rates by noise, and utterances with their words in time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from embedcache.arrays import Array, Floats
from embedcache.reports.figures import BAD, COLORS, GRID, INK, SOFT
from embedcache.sources.media import AUDIO_RATE_HZ
from pipelines.avsr.ctc import WordTime
from pipelines.avsr.edits import align_words
from pipelines.avsr.results import level_name, measured, views_of, word_error_rate
from pipelines.curves import Curves, estimate_curves
from pipelines.results import Results
from pipelines.worlds.talking_mouth import VIDEO_RATE_HZ, Phone

_MARGIN = 1.5  # inches on the left, for the names of the lines
_MOST_FRAMES = 33


def error_curves(
    results: Results, titles: Mapping[str, str], models: Sequence[str], *, controls: Collection[str] = ()
) -> Figure:
    """Draw word error rates by the level of noise, with 95% intervals as bands, one panel per test set.

    Args:
        results: results of all seeds.
        titles: test set -> title of its panel.
        models: models to draw, as far as a set has results of them. A model has one color in all panels.
        controls: models drawn with thin dashed lines.
    """
    panels = {}
    for test_set, title in titles.items():
        views = views_of(results, test_set)
        lines = {}
        for model in measured(results, models, test_set):
            lines[model] = [word_error_rate(results, model, test_set, view) for view in views]
        panels[title] = Curves([level_name(view) for view in views], lines)
    return estimate_curves(panels, x="signal-to-noise ratio", y="word error rate", controls=controls)


@dataclass(frozen=True, kw_only=True)
class UtteranceRow:
    """An utterance with the words that recognizers heard.

    Args:
        title: text above.
        frames: (T, H, W) uint8.
        samples_N: (N,) float32 of the sound.
        phones: phones of the speech.
        words: words of the reference with their times.
        recognized: name -> recognized words with their times.
    """

    title: str
    frames: Array
    samples_N: Floats
    phones: Sequence[Phone]
    words: Sequence[WordTime]
    recognized: Mapping[str, Sequence[WordTime]] = field(default_factory=dict)


def utterance_figure(rows: Sequence[UtteranceRow], *, width: float = 13.0) -> Figure:
    """Draw utterances in time: a frame every 80 ms, phones, the wave, and the words of the reference and of each model.

    Recognized words are drawn where CTC is certain of their letters; wrong ones are red. The contrast of the frames is
    stretched. Fewer frames are shown of utterances longer than 2.6 s.
    """
    heights = [height for row in rows for height in _row_heights(row, width)]
    margins = 0.3, 0.05  # inches above and below

    figure = Figure(figsize=(width, sum(heights) + sum(margins)))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0)
    total = sum(heights) + sum(margins)
    grid.update(left=_MARGIN / width, right=1 - 0.1 / width, bottom=margins[1] / total, top=1 - margins[0] / total)

    for number, row in enumerate(rows):
        axes = [figure.add_subplot(grid[4 * number + part]) for part in range(3)]
        for panel in axes:
            panel.set(xlim=(0, _duration_s(row)), yticks=[], xticks=[])
            for spine in panel.spines.values():
                spine.set_visible(False)

        _draw_frames(axes[0], row)
        _draw_wave(axes[1], row)
        _draw_words(axes[2], row)

        axes[0].set_title(row.title, loc="left", fontsize=9, color=INK, pad=4)

        # One axis of time, below the words.
        axes[2].spines["bottom"].set_visible(True)
        axes[2].spines["bottom"].set_color(SOFT)
        axes[2].set_xticks(np.arange(0, _duration_s(row), 0.5))
        axes[2].xaxis.set_major_formatter(lambda value, _: f"{value:.1f} s")
        axes[2].tick_params(colors=INK, labelsize=7, color=SOFT)

    return figure


def _row_heights(row: UtteranceRow, width: float) -> list[float]:
    """Return the heights of the frames, the wave, the words, and the space below in inches."""
    shown_width = (width - _MARGIN) * _frame_step_s(row) / _duration_s(row)
    frames = shown_width * row.frames.shape[1] / row.frames.shape[2]
    return [frames, 0.75, 0.22 * (len(row.recognized) + 1) + 0.08, 0.55]


def _frame_step_s(row: UtteranceRow) -> float:
    """Return the time between two frames that are shown: 80 ms or a multiple of it."""
    return 0.08 * max(1, int(np.ceil(_duration_s(row) / (0.08 * _MOST_FRAMES))))


def _duration_s(row: UtteranceRow) -> float:
    return max(0.1, len(row.frames) / VIDEO_RATE_HZ, len(row.samples_N) / AUDIO_RATE_HZ)


def _draw_frames(axes: Any, row: UtteranceRow) -> None:
    """Draw the middle frame of each interval."""
    # Percentiles, so that a few bright pixels do not decide the contrast.
    low, high = np.percentile(row.frames, [0.5, 99.5])
    step_s = _frame_step_s(row)

    for start_s in np.arange(0, len(row.frames) / VIDEO_RATE_HZ - 0.5 * step_s, step_s):
        frame = row.frames[min(len(row.frames) - 1, int((start_s + step_s / 2) * VIDEO_RATE_HZ))]
        scaled = np.clip((frame - low) / max(1.0, high - low), 0, 1)
        extent = (start_s + 0.015 * step_s, start_s + 0.985 * step_s, 0, 1)
        axes.imshow(np.repeat(scaled[..., None], 3, axis=2), extent=extent, aspect="auto", interpolation="antialiased")

    axes.set(xlim=(0, _duration_s(row)), ylim=(0, 1))


def _draw_wave(axes: Any, row: UtteranceRow) -> None:
    """Draw the wave, with phones above it and lines between them."""
    axes.set_ylim(-1.05, 1.75)
    num_bins = 900

    # The range of each bin, so that no peak is lost between two drawn samples.
    cells = np.array_split(row.samples_N, num_bins)
    times_s = (np.arange(num_bins) + 0.5) / num_bins * len(row.samples_N) / AUDIO_RATE_HZ
    peak = max(1e-9, float(np.abs(row.samples_N).max()))
    low = [float(cell.min()) / peak if len(cell) else 0.0 for cell in cells]
    high = [float(cell.max()) / peak if len(cell) else 0.0 for cell in cells]
    axes.fill_between(times_s, low, high, color=COLORS[0], alpha=0.55, linewidth=0)

    for phone in row.phones:
        if phone.name == "SIL":
            continue
        axes.plot([phone.start_s] * 2, [-1, 1.7], color=GRID, linewidth=0.8, zorder=0)
        axes.plot([phone.stop_s] * 2, [-1, 1.7], color=GRID, linewidth=0.8, zorder=0)
        middle_s = (phone.start_s + phone.stop_s) / 2
        axes.text(middle_s, 1.38, phone.name, ha="center", va="center", fontsize=7, color=INK)


def _draw_words(axes: Any, row: UtteranceRow) -> None:
    """Draw a line of words for the reference and for each recognizer."""
    axes.set_ylim(-len(row.recognized) - 0.6, 0.6)

    reference = " ".join(word.word for word in row.words)
    _draw_line(axes, 0, "said", row.words, [True] * len(row.words))
    for line, (name, words) in enumerate(row.recognized.items(), start=1):
        # Substituted and inserted words are wrong; deleted words are not drawn.
        (pairs,) = align_words([reference], [" ".join(word.word for word in words)])
        is_right = [said == heard for said, heard in pairs if heard]
        _draw_line(axes, -line, name, words, is_right)


def _draw_line(axes: Any, place: float, name: str, words: Sequence[WordTime], is_right: Sequence[bool]) -> None:
    axes.annotate(
        name,
        (0, place),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=INK,
        annotation_clip=False,
    )
    for word, right in zip(words, is_right, strict=True):
        color = (COLORS[1] if place else INK) if right else BAD
        axes.plot([word.start_s, word.stop_s], [place - 0.42] * 2, color=color, linewidth=2.2, solid_capstyle="butt")
        middle_s = (word.start_s + word.stop_s) / 2
        axes.text(middle_s, place + 0.04, word.word, ha="center", va="center", fontsize=8, color=color)
