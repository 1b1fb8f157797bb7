"""`frames:lite:efficientnet-lite0,rate=25`: any image encoder on each frame of a video; `frames:pixels` for the pixels.

Videos differ in their rates, and a feature has one: each video is sampled at `rate` frames per second, so that the time
axis holds for all of them. The frame shown at the middle of a step stands for it; frames are dropped or repeated, never
blended. Features are the image encoder's vectors, one row per frame, and `mean`, the mean over the first of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from embedcache.arrays import Array, blocks
from embedcache.axis import Axis
from embedcache.encoders.base import NO_WEIGHTS, Encoder, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec, check_modality, check_options, open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import ItemError, SettingError

RATE_HZ = 25.0
"""Default rate: half the 50 Hz of speech encoders, and that of most recordings of talking faces."""
PIXELS_SIZE = (24, 16)
"""Default width and height of `frames:pixels`."""
_VIDEOS_PER_BATCH = 4
_FRAMES_PER_CALL = 32


class RawVideo(Protocol):
    """What a video item has: (T, H, W, 3) uint8 RGB frames, and frames per second."""

    @property
    def frames_THW3(self) -> Array: ...
    @property
    def rate_hz(self) -> float: ...


def open_frames(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open an image encoder for videos.

    Options: `rate`, frames per second; of `frames:pixels` also `size`, WIDTHxHEIGHT in pixels. All other options are
    those of the image encoder.
    """
    check_modality(spec, modality, "video")
    rate_hz = _rate(spec)
    if spec.model == "pixels":
        check_options(spec, ("rate", "size"))
        return FrameEncoder(Pixels(_size(spec), batch_size=settings.batch_size or 256), rate_hz)
    if spec.inner is None:
        raise SettingError(
            f"{spec.text}: expected frames:pixels or frames:SPEC with the spec of an image encoder, such as "
            "frames:lite:efficientnet-lite0"
        )
    return FrameEncoder(open_encoder(spec.inner, modality="image", settings=settings), rate_hz)


class FrameEncoder:
    """A video encoder that runs an image encoder on frames at a fixed rate.

    Args:
        encoder: the image encoder; those of its features that are vectors are offered.
    """

    modality: Modality = "video"

    def __init__(self, encoder: Encoder, rate_hz: float) -> None:
        self._encoder, self._rate_hz = encoder, rate_hz
        vectors = {name: shape for name, shape in encoder.features.items() if len(shape) == 1}
        if not vectors:
            raise SettingError(
                f"{encoder.fingerprint.model} has no feature of one vector per image, only "
                f"{', '.join(encoder.features)}; choose another image encoder"
            )
        self._default = next(iter(vectors))
        self.features: Mapping[str, ItemShape] = {
            "mean": vectors[self._default],
            **{name: (-1, *shape) for name, shape in vectors.items() if name != "mean"},
        }
        axis = Axis(kind="time", rate_hz=rate_hz, start_s=0.5 / rate_hz)
        self.axes = {name: axis for name in self.features if name != "mean"}
        self.batch_size = _VIDEOS_PER_BATCH
        image = encoder.fingerprint
        self.fingerprint = replace(
            image,
            family="frames",
            model=f"{image.family}:{image.model}",
            preprocessing={"rate_hz": rate_hz, "frame": "shown at the middle of a step", "image": image.preprocessing},
            pooling={
                "mean": f"mean over the frames of {self._default}",
                **{name: image.pooling[name] for name in vectors if name in image.pooling and name != "mean"},
            },
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Sample and prepare the frames of each video: (T, …), one row per step."""
        return [self._prepare(video) for video in items]

    def _prepare(self, video: RawVideo) -> Array:
        numbers = sampled_frames(_check_video(video), video.rate_hz, self._rate_hz)
        distinct, rows = np.unique(numbers, return_inverse=True)
        frames: list[Array] = []
        for block in blocks(len(distinct), _FRAMES_PER_CALL):  # all images at once would need the video a second time
            images = [Image.fromarray(np.ascontiguousarray(video.frames_THW3[number])) for number in distinct[block]]
            frames += self._encoder.prepare(images)
        prepared: Array = np.stack(frames)[rows]
        return prepared

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Run the image encoder on the frames of several videos, in batches of its own size."""
        check_names(names, self.features)
        sources = list(dict.fromkeys(self._default if name == "mean" else name for name in names))
        frames = [frame for frames in prepared for frame in frames]
        parts: dict[str, list[Array]] = {name: [] for name in sources}
        for start in range(0, len(frames), self._encoder.batch_size):
            for name, rows in self._encoder.encode(frames[start : start + self._encoder.batch_size], sources).items():
                parts[name] += rows
        stops = np.cumsum([len(frames) for frames in prepared])
        slices = [slice(stop - len(frames), stop) for stop, frames in zip(stops, prepared, strict=True)]
        return {
            name: [_mean(parts[self._default][rows]) for rows in slices]
            if name == "mean"
            else [np.stack(parts[name][rows]) for rows in slices]
            for name in names
        }


def _mean(vectors: Sequence[Array]) -> Array:
    return np.asarray(np.mean(vectors, axis=0, dtype=np.float32))


def sampled_frames(num_frames: int, rate_hz: float, wanted_hz: float) -> Array:
    """Return the numbers of the frames of a video that stand for steps at another rate: at least one.

    Example:
        >>> sampled_frames(6, 50, 25).tolist(), sampled_frames(3, 10, 20).tolist()
        ([1, 3, 5], [0, 0, 1, 1, 2, 2])
    """
    num_steps = max(1, round(num_frames * wanted_hz / rate_hz))
    numbers: Array = np.floor((np.arange(num_steps) + 0.5) * rate_hz / wanted_hz).astype(np.int64)
    return np.minimum(numbers, num_frames - 1)


def _check_video(video: RawVideo) -> int:
    """Return the number of frames, or raise an `ItemError`."""
    frames = video.frames_THW3
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ItemError(f"expected uint8 RGB frames, got {frames.dtype} of shape {frames.shape}")
    if not frames.size:
        raise ItemError(f"no frames, got shape {frames.shape}")
    if not (np.isfinite(video.rate_hz) and video.rate_hz > 0):
        raise ItemError(f"expected a positive frame rate, got {video.rate_hz}")
    return len(frames)


class Pixels:
    """An image encoder whose vector is the gray image itself: the center of the size's aspect ratio, resized."""

    modality: Modality = "image"

    def __init__(self, size: tuple[int, int], *, batch_size: int) -> None:
        self._size, self.batch_size = size, batch_size
        self.features: Mapping[str, ItemShape] = {"pixels": (size[0] * size[1],)}
        self.fingerprint = Fingerprint(
            family="pixels",
            model=f"{size[0]}x{size[1]}",
            weights=NO_WEIGHTS,
            preprocessing={"width": size[0], "height": size[1], "interpolation": "bilinear (Pillow)", "range": [0, 1]},
            pooling={"pixels": "all pixels in gray, row by row"},
            backend="numpy",
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        method = Image.Resampling.BILINEAR
        return [np.asarray(ImageOps.fit(image.convert("L"), self._size, method=method)) for image in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        vectors: list[Array] = [image.ravel() / np.float32(255) for image in prepared]
        return {name: list(vectors) for name in names}


def _rate(spec: EncoderSpec) -> float:
    text = spec.options.get("rate")
    if text is None:
        return RATE_HZ
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 0 < float(text) <= 1000:
        raise SettingError(f"option rate in {spec.text}: expected frames per second, such as 25 or 0.5, got {text!r}")
    return float(text)


def _size(spec: EncoderSpec) -> tuple[int, int]:
    text = spec.options.get("size")
    if text is None:
        return PIXELS_SIZE
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise SettingError(f"option size in {spec.text}: expected WIDTHxHEIGHT in pixels, such as 24x16, got {text!r}")
    return int(match[1]), int(match[2])
