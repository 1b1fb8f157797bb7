"""`frames:lite:efficientnet-lite0,rate=25`: any image encoder on each frame of a video.

Videos differ in their rates, and a feature has one: each video is sampled at `rate` frames per second, so that the time
axis fits all of them. The frame shown at the middle of a step stands for it; frames are dropped or repeated, never
blended. Features are the image encoder's vectors, one row per frame, and `mean`, the mean over the first of them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
from PIL import Image

from embedcache.arrays import Array, blocks
from embedcache.encoders.base import Encoder, EncoderSettings, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec, check_modality, open_encoder
from embedcache.errors import ItemError, SettingError
from embedcache.settings import format_bytes
from embedcache.store.layout import Axis

RATE_HZ = 25.0
"""Default rate: half the 50 Hz of speech encoders, and that of most recordings of talking faces."""
_VIDEOS_PER_BATCH = 4
_MAX_PREPARED_BYTES = 2**31
"""Prepared frames of one video; 14,266 of uint8 at 224 x 224, 3,566 of float32."""


class RawVideo(Protocol):
    """Attributes that a video item has; see `embedcache.sources.media.Video`."""

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
        raise SettingError(f"{spec.text}: expected frames:SPEC of an image encoder: frames:lite:efficientnet-lite0")
    return FrameEncoder(open_encoder(spec.inner, modality="image", settings=settings), rate_hz)


class FrameEncoder:
    """A video encoder that runs an image encoder on frames at a fixed rate.

    Args:
        encoder: the image encoder; only its vector features are offered.
    """

    modality: Modality = "video"

    def __init__(self, encoder: Encoder, rate_hz: float) -> None:
        self._encoder = encoder
        self._rate_hz = rate_hz

        vectors = {name: shape for name, shape in encoder.features.items() if len(shape) == 1}
        if not vectors:
            raise SettingError(f"{encoder.fingerprint.model} has no vectors, only {', '.join(encoder.features)}")

        self._default = next(iter(vectors))
        image = encoder.fingerprint
        axis = Axis(kind="time", rate_hz=rate_hz, start_s=0.5 / rate_hz)
        self.batch_size = _VIDEOS_PER_BATCH

        # `mean` is the video's own feature, so it replaces a feature of that name of the image encoder.
        features: dict[str, ItemShape] = {"mean": vectors[self._default]}
        pooling = {"mean": f"mean over the frames of {self._default}"}
        self.axes: dict[str, Axis] = {}
        for name, shape in vectors.items():
            if name == "mean":
                continue
            features[name] = (-1, *shape)
            self.axes[name] = axis
            if name in image.pooling:
                pooling[name] = image.pooling[name]
        self.features: Mapping[str, ItemShape] = features

        self.fingerprint = replace(
            image,
            family="frames",
            model=f"{image.family}:{image.model}",
            preprocessing={"rate_hz": rate_hz, "frame": "shown at the middle of a step", "image": image.preprocessing},
            pooling=pooling,
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Sample and prepare the frames of each video: (T, …), one row per step.

        Memory: the prepared frames of the videos, and of one of them twice.

        Raises:
            ItemError: a video has no frames or is damaged, or its prepared frames take more than 2 GiB.
        """
        return list(map(self._prepare, items))

    def _prepare(self, video: RawVideo) -> Array:
        """Prepare the frame of each step while frames are decoded. The last frame also stands for steps after it."""
        prepared: list[Array] = []
        number = -1

        for number, frame in enumerate(video.frames()):
            if number == self._frame_at(len(prepared), video):
                image = self._prepare_frame(frame())
                while number == self._frame_at(len(prepared), video):
                    prepared.append(image)
                self._check_size(video, len(prepared), image.nbytes)

        # The number of frames is known only now: the file may state none, or a wrong one.
        num_steps = max(1, round((number + 1) * self._rate_hz / video.rate_hz))
        if len(prepared) < num_steps:
            prepared += [self._prepare_frame(frame())] * (num_steps - len(prepared))

        return np.stack(prepared[:num_steps])

    def _frame_at(self, step: int, video: RawVideo) -> int:
        """Return the number of the frame that is shown at the middle of a step."""
        return math.floor((step + 0.5) * video.rate_hz / self._rate_hz)

    def _prepare_frame(self, frame_HW3: Array) -> Array:
        return self._encoder.prepare([Image.fromarray(np.ascontiguousarray(frame_HW3))])[0]

    def _check_size(self, video: RawVideo, num_steps: int, frame_bytes: int) -> None:
        """Check that the prepared frames of a video fit into memory, given the size of its first frames."""
        num_expected = max(num_steps, round((video.duration_s or 0) * self._rate_hz))
        if num_expected * frame_bytes > _MAX_PREPARED_BYTES:
            size = format_bytes(num_expected * frame_bytes)
            raise ItemError(f"too many frames: {num_expected:,} at rate={self._rate_hz:g}, {size}; choose a lower rate")

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Run the image encoder on the frames of several videos, in batches of its own size."""
        check_names(names, self.features)
        sources = {name: self._default if name == "mean" else name for name in names}

        # Frames of several videos share batches of the image encoder's own size.
        frames = list(chain.from_iterable(prepared))
        encoded: dict[str, list[Array]] = {source: [] for source in sources.values()}

        for rows in blocks(len(frames), self._encoder.batch_size):
            for source, vectors in self._encoder.encode(frames[rows], list(encoded)).items():
                encoded[source] += vectors

        outputs: dict[str, list[Array]] = {name: [] for name in names}
        start = 0

        for video in prepared:
            for name, source in sources.items():
                vectors_TD = np.stack(encoded[source][start : start + len(video)])
                outputs[name].append(vectors_TD.mean(axis=0, dtype=np.float32) if name == "mean" else vectors_TD)
            start += len(video)

        return outputs


def _rate(spec: EncoderSpec) -> float:
    text = spec.options.get("rate")
    if text is None:
        return RATE_HZ

    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 0 < float(text) <= 1000:
        raise SettingError(f"option rate in {spec.text}: expected frames per second, such as 25 or 0.5, got {text!r}")
    return float(text)
