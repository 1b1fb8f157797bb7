"""Encoders of recordings, videos and point clouds, small enough to read: what a plug-in of each modality looks like.

Named `tests.media_toy:open_media` on the command line; it serves each of the three modalities.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, EncoderSettings, Fingerprint, ItemShape, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import ItemError
from embedcache.store.layout import Axis

MEDIA = "tests.media_toy:open_media"
_HOP = 320  # samples per frame: 50 per second


def open_media(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder of a modality."""
    kinds: dict[str, type[Any]] = {"audio": ToyAudio, "video": ToyVideo, "points": ToyPoints}
    encoder: Encoder = kinds[modality]()
    return encoder


def _fingerprint(modality: str, pooling: Mapping[str, str]) -> Fingerprint:
    weights = hashlib.sha256(modality.encode()).hexdigest()
    return Fingerprint(family=MEDIA, model=modality, weights=weights, preprocessing={}, pooling=pooling)


class ToyAudio:
    """`mean` (2,), `frames` (-1, 2): loudness and zero crossings of each 20 ms."""

    modality: Modality = "audio"
    features: Mapping[str, ItemShape] = {"mean": (2,), "frames": (-1, 2)}
    axes: Mapping[str, Axis] = {"frames": Axis(kind="time", rate_hz=50.0, start_s=0.0)}
    batch_size = 4
    fingerprint = _fingerprint("audio", {"mean": "mean of frames", "frames": "20 ms each"})

    def prepare(self, items: Sequence[Array]) -> list[Array]:
        for samples in items:
            if len(samples) < _HOP:
                raise ItemError(f"too short: {len(samples)} samples, expected at least {_HOP}")
        return [samples[: len(samples) // _HOP * _HOP].reshape(-1, _HOP) for samples in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        frames = [
            np.stack([np.abs(cells).mean(axis=1), (np.diff(np.sign(cells), axis=1) != 0).mean(axis=1)], axis=1)
            for cells in prepared
        ]
        outputs = {"frames": [array.astype(np.float32) for array in frames]}
        outputs["mean"] = [array.mean(axis=0).astype(np.float32) for array in frames]
        return {name: outputs[name] for name in names}


class ToyVideo:
    """`mean` (3,), `frames` (-1, 3): the mean color of each frame; only of videos at 25 frames per second."""

    modality: Modality = "video"
    features: Mapping[str, ItemShape] = {"mean": (3,), "frames": (-1, 3)}
    axes: Mapping[str, Axis] = {"frames": Axis(kind="time", rate_hz=25.0, start_s=0.0)}
    batch_size = 4
    fingerprint = _fingerprint("video", {"mean": "mean of frames", "frames": "mean color"})

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        for video in items:
            if video.rate_hz != 25:
                raise ItemError(f"expected 25 frames per second, got {video.rate_hz:g}")
        return [video.frames_THW3.mean(axis=(1, 2), dtype=np.float32) / 255 for video in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        outputs = {"frames": list(prepared), "mean": [frames.mean(axis=0) for frames in prepared]}
        return {name: outputs[name] for name in names}


class ToyPoints:
    """`extent` (3,), and three fields of each point: `xyz` (-1, 3), `uv` (-1, 2), `label` (-1, 1)."""

    modality: Modality = "points"
    features: Mapping[str, ItemShape] = {"extent": (3,), "xyz": (-1, 3), "uv": (-1, 2), "label": (-1, 1)}
    axes: Mapping[str, Axis] = {name: Axis(kind="points") for name in ("xyz", "uv", "label")}
    dtypes: Mapping[str, str] = {"xyz": "float32", "uv": "float32", "label": "int16"}
    batch_size = 4
    fingerprint = _fingerprint("points", {name: name for name in features})

    def prepare(self, items: Sequence[Mapping[str, Array]]) -> list[Array]:
        return [np.column_stack([item["xyz"], item["uv"], item["label"]]).astype(np.float32) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        outputs = {
            "extent": [np.ptp(array[:, :3], axis=0) for array in prepared],
            "xyz": [array[:, :3] for array in prepared],
            "uv": [array[:, 3:5] for array in prepared],
            "label": [array[:, 5:] for array in prepared],
        }
        return {name: outputs[name] for name in names}
