"""Fit the weights of the video encoder `stacks:FILE`, from videos or from `frames:pixels` features; no labels are used.

The weights are the mean and the first whitened principal components of all stacks, from their second moments: one pass,
and as exact as if all stacks were in memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.derive.rules import principal_components
from embedcache.encoders.frames import PIXELS_SIZE, RATE_HZ, FrameEncoder, Pixels, RawVideo
from embedcache.encoders.stacks import Normalization, StackWeights, gray_pixels, normalize_frames, stack_frames
from embedcache.errors import DataError, SettingError
from embedcache.projectors.closed_form import Moments
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature

_STACKS_PER_BLOCK = 2_048


def fit_stacks(
    videos: Iterable[RawVideo],
    path: Path | str,
    *,
    width: int = 64,
    stack: int = 5,
    size: tuple[int, int] = PIXELS_SIZE,
    rate_hz: float = RATE_HZ,
    normalize: Normalization = "clip",
) -> StackWeights:
    """Fit the encoder to videos and write its file.

    Memory: one video, and 24 bytes times the square of the pixels in a stack (89 MB for 5 frames of 24 x 16).

    Args:
        videos: decoded videos, read once.
        path: `.safetensors` file to write; its name becomes that of the encoder.
        width: number of components.
        stack: frames in a stack.
        size: width and height to which the center of a frame is shrunk, in pixels.
        rate_hz: frames per second at which every video is sampled.
        normalize: `clip` makes videos of other people and other light alike; `none` keeps the frames as they are.

    Raises:
        SettingError: a setting out of its range.
        ItemError: a video has no frames.
        DataError: the stacks of the videos have fewer directions than `width`.
    """
    if min(size) < 1 or not 0 < rate_hz < np.inf:
        raise SettingError(f"stacks: expected a size and a rate above 0, got {size} and {rate_hz}")
    frames = FrameEncoder(Pixels(size, batch_size=1), rate_hz)
    clips = (clip for video in videos for clip in frames.prepare([video]))
    return _fit(
        map(gray_pixels, clips), Path(path), width=width, stack=stack, size=size, rate_hz=rate_hz, normalize=normalize
    )


def fit_stacks_from_cache(
    cache_path: Path | str,
    path: Path | str,
    *,
    feature: str = "pixels/pixels",
    rows: Ints | None = None,
    width: int = 64,
    stack: int = 5,
    normalize: Normalization = "clip",
) -> StackWeights:
    """Fit the encoder to the pixels of videos in a cache, chunk by chunk, and write its file.

    The size and the rate are those of the feature. Memory: one chunk of it, and what `fit_stacks` says.

    Args:
        cache_path: cache with a feature of `frames:pixels`.
        path: `.safetensors` file to write.
        feature: `encoder/feature`.
        rows: rows of the videos to fit to, such as those of a training part; None: all that have the feature.
        width: number of components.
        stack: frames in a stack.
        normalize: as in `fit_stacks`.

    Raises:
        UnknownNameError: there is no such feature.
        SettingError: it is not one of `frames:pixels`, or a setting is out of its range.
        UnfinishedError: chunks of the feature are missing.
        DataError: the stacks have fewer directions than `width`.
    """
    opened = Cache(cache_path).feature("video", feature)
    preprocessing = opened.fingerprint["preprocessing"]
    image = preprocessing.get("image") or {}
    if not ({"width", "height"} <= image.keys() and opened.fingerprint["family"] == "frames" and opened.is_ragged):
        raise SettingError(f"feature: expected pixels of the encoder frames:pixels, got {opened.name}")
    opened.require_complete()
    wanted: Bools = np.full(opened.num_items, rows is None)
    if rows is not None:
        wanted[rows] = True
    size = image["width"], image["height"]
    return _fit(
        _read_clips(opened, wanted),
        Path(path),
        width=width,
        stack=stack,
        size=size,
        rate_hz=preprocessing["rate_hz"],
        normalize=normalize,
    )


def _read_clips(feature: Feature, wanted: Bools) -> Iterator[Array]:
    for number in range(feature.group.info.num_chunks(feature.modality)):
        start = number * feature.group.info.chunk_size
        commit = feature.group.commit(number)
        assert commit is not None  # the feature is complete
        if wanted[start : start + len(commit.hashes)].any():
            for row, frames in enumerate(feature.items(commit), start):
                if frames is not None and wanted[row]:
                    yield frames


def _fit(
    clips: Iterable[Array],
    path: Path,
    *,
    width: int,
    stack: int,
    size: tuple[int, int],
    rate_hz: float,
    normalize: Normalization,
) -> StackWeights:
    """Fit to the (T, D) pixels of each clip."""
    num_pixels = size[0] * size[1]
    if normalize not in get_args(Normalization):
        raise SettingError(f"normalize: expected {' or '.join(get_args(Normalization))}, got {normalize!r}")
    if stack < 1 or not 1 <= width <= stack * num_pixels:
        raise SettingError(
            f"width: expected 1 to {stack * num_pixels} components of {stack} frames of {size[0]} x {size[1]}, got "
            f"{width}"
        )
    moments = Moments(stack * num_pixels)
    for clip_TD in clips:
        frames_TD = normalize_frames(clip_TD, normalize)
        for steps in blocks(len(frames_TD), _STACKS_PER_BLOCK):
            moments.add(stack_frames(frames_TD, stack, steps))
    if moments.num_rows < 2:
        raise DataError(f"expected videos with at least 2 frames to fit stacks, got {moments.num_rows} frames")
    mean_D, components_DE = principal_components(moments, width, whiten=True)
    weights = StackWeights(
        mean_KD=mean_D.reshape(stack, -1),
        components_KDE=components_DE.reshape(stack, num_pixels, -1),
        size=size,
        rate_hz=rate_hz,
        normalize=normalize,
    )
    weights.save(path)
    return weights
