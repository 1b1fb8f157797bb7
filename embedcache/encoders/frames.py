"""`frames:lite:efficientnet-lite0,rate=25`: any image encoder on each frame of a video.

Videos differ in their rates, and a feature has one: each video is sampled at `rate` frames per second, so that the time
axis holds for all of them. The frame shown at the middle of a step stands for it; frames are dropped or repeated, never
blended. Features are the image encoder's vectors, one row per frame, and `mean`, the mean over the first of them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from embedcache.arrays import Array
from embedcache.axis import Axis
from embedcache.encoders.base import Encoder, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec, check_modality, open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import ItemError, SettingError
from embedcache.units import format_bytes

RATE_HZ = 25.0
"""Default rate: half the 50 Hz of speech encoders, and that of most recordings of talking faces."""
_VIDEOS_PER_BATCH = 4
_MAX_PREPARED_BYTES = 2**31
"""Prepared frames of one video; 14,266 of uint8 at 224 x 224, 3,566 of float32."""


class RawVideo(Protocol):
    """What a video item has, see `embedcache.sources.media.Video`."""

    @property
    def rate_hz(self) -> float: ...
    @property
    def duration_s(self) -> float | None: ...
    def frames(self) -> Iterator[Callable[[], Array]]: ...


def open_frames(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open an image encoder for videos.

    Options: `rate`, frames per second; all others are those of the image encoder.
    """
    check_modality(spec, modality, "video")
    rate_hz = _rate(spec)
    if spec.inner is None:
        raise SettingError(
            f"{spec.text}: expected frames:SPEC with the spec of an image encoder, such as "
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
        """Sample and prepare the frames of each video: (T, …), one row per step.

        Memory: the prepared frames of the videos, and of one of them twice.

        Raises:
            ItemError: a video has no frames or is damaged, or its prepared frames take more than 2 GiB.
        """
        return [self._prepare(video) for video in items]

    def _prepare(self, video: RawVideo) -> Array:
        """Prepare the frames that `sampled_frames` numbers while they are decoded, and the last one if it is needed."""
        prepared: dict[int, Array] = {}
        number, step = -1, 0
        for number, frame in enumerate(video.frames()):
            if number == _number_at(step, video.rate_hz, self._rate_hz):
                prepared[number] = self._prepare_frame(frame())
                while _number_at(step, video.rate_hz, self._rate_hz) == number:
                    step += 1
                self._check_size(video, step, prepared[number].nbytes)
        numbers = sampled_frames(number + 1, video.rate_hz, self._rate_hz)
        if numbers[-1] not in prepared:
            prepared[number] = self._prepare_frame(frame())
        return np.stack([prepared[number] for number in numbers.tolist()])

    def _prepare_frame(self, frame_HW3: Array) -> Array:
        return self._encoder.prepare([Image.fromarray(np.ascontiguousarray(frame_HW3))])[0]

    def _check_size(self, video: RawVideo, num_steps: int, frame_bytes: int) -> None:
        """Check that the prepared frames of a video fit into memory, given those of its first steps."""
        num_expected = max(num_steps, round((video.duration_s or 0) * self._rate_hz))
        if num_expected * frame_bytes > _MAX_PREPARED_BYTES:
            raise ItemError(
                f"too many frames: {num_expected:,} at rate={self._rate_hz:g} take "
                f"{format_bytes(num_expected * frame_bytes)} as inputs of the model, more than "
                f"{format_bytes(_MAX_PREPARED_BYTES)}; choose a lower rate, or index intervals of it"
            )

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


def _number_at(step: int, rate_hz: float, wanted_hz: float) -> int:
    """Return the number of the frame at the middle of a step, of a video that does not end before: to the same bits."""
    return math.floor((step + 0.5) * rate_hz / wanted_hz)


def _rate(spec: EncoderSpec) -> float:
    text = spec.options.get("rate")
    if text is None:
        return RATE_HZ
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 0 < float(text) <= 1000:
        raise SettingError(f"option rate in {spec.text}: expected frames per second, such as 25 or 0.5, got {text!r}")
    return float(text)
