"""`stacks:FILE`: whitened principal components of a few consecutive gray frames, fitted to unlabeled videos.

A stack is a frame with the two before and the two after it, so that one vector says how things move. The mean and the
components in the file are fitted by `embedcache.derive.stacks`. Made for videos of a mouth or a face that fills the
frame: whatever the frame shows is described, and nothing is searched for in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from embedcache.arrays import Array, Floats
from embedcache.axis import Axis
from embedcache.devices import torch_device
from embedcache.encoders.base import Encoder, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.frames import FrameEncoder, Pixels
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.weights import check_weights_file, hash_weights
from embedcache.errors import ArtifactError, CorruptError, SettingError, one_line
from embedcache.files import expand_home, replacing
from embedcache.provenance import canonical_json, construct

Normalization: TypeAlias = Literal["clip", "none"]
"""`clip` subtracts the mean frame of a video and divides by the standard deviation of what is left; `none` does not."""

_FORMAT = 1
_METADATA = "embedcache"
_NAMES = {"mean", "components", "format", "size", "rate_hz", "normalize"}
_MIN_DEVIATION = 1e-6  # below it, a video is the same frame throughout


@dataclass(frozen=True, kw_only=True, eq=False)
class StackWeights:
    """Weights of the encoder: mean and principal components of stacked frames.

    Args:
        mean_KD: (K, D) float32, mean of the stacks of K frames of D pixels.
        components_KDE: (K, D, E) float32, the components, each divided by its standard deviation.
        size: width and height of the gray frames in pixels; D is their product.
        rate_hz: frames per second.
        normalize: how the frames of a video are normalized.
    """

    mean_KD: Floats
    components_KDE: Floats
    size: tuple[int, int]
    rate_hz: float
    normalize: Normalization

    def __post_init__(self) -> None:
        num_pixels, shape = self.size[0] * self.size[1], self.components_KDE.shape
        if len(shape) != 3 or shape[1] != num_pixels or self.mean_KD.shape != shape[:2] or not min(shape):
            raise ArtifactError(
                f"stacks: expected a mean (K, {num_pixels}) and components (K, {num_pixels}, E) for frames of "
                f"{self.size[0]} x {self.size[1]}, got {self.mean_KD.shape} and {shape}"
            )
        if self.normalize not in get_args(Normalization) or not 0 < self.rate_hz < np.inf:
            raise ArtifactError(
                f"stacks: expected normalize to be one of {', '.join(get_args(Normalization))} and a positive rate, "
                f"got {self.normalize!r} and {self.rate_hz!r}"
            )

    def save(self, path: Path) -> None:
        """Write a `.safetensors` file, atomically, whose metadata says how frames are made."""
        values = {
            "kind": "stacks",
            "format": _FORMAT,
            "size": list(self.size),
            "rate_hz": self.rate_hz,
            "normalize": self.normalize,
        }
        with replacing(path) as temporary:
            save_file(self._tensors, temporary, metadata={_METADATA: canonical_json(values).decode()})

    @classmethod
    def load(cls, path: Path) -> "StackWeights":
        """Read a file that `save` wrote.

        Raises:
            PathError: it does not exist.
            CorruptError: it is not a `.safetensors` file, or its metadata is damaged.
            ArtifactError: it holds something else, or was written by a later version.
        """
        check_weights_file(path)
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, ValueError, OSError) as error:
            raise CorruptError(f"cannot read {path} as weights: {one_line(error)}; fit it again") from error
        if not isinstance(record, dict) or record.get("kind") != "stacks" or not {*tensors, *record} >= _NAMES:
            raise ArtifactError(
                f"{path}: expected a file of fit_stacks in embedcache/derive/stacks.py, got other weights "
                f"({', '.join(sorted(tensors)[:3])})"
            )
        return construct(path, lambda: cls._from_record(path, record, tensors))

    @classmethod
    def _from_record(cls, path: Path, record: Mapping[str, Any], tensors: Mapping[str, Array]) -> "StackWeights":
        if record["format"] > _FORMAT:
            raise ArtifactError(f"{path} has format {record['format']}; this version reads {_FORMAT}: upgrade")
        width, height = record["size"]
        return cls(
            mean_KD=tensors["mean"],
            components_KDE=tensors["components"],
            size=(width, height),
            rate_hz=record["rate_hz"],
            normalize=record["normalize"],
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the mean and the components."""
        return hash_weights({name: torch.from_numpy(tensor) for name, tensor in self._tensors.items()})

    @property
    def _tensors(self) -> dict[str, Array]:
        return {
            "mean": np.ascontiguousarray(self.mean_KD, np.float32),
            "components": np.ascontiguousarray(self.components_KDE, np.float32),
        }

    def project(self, frames_TD: Floats) -> Floats:
        """Project the stack around each frame, (T, E) float32; beyond its ends a video stands still.

        Args:
            frames_TD: (T, D) gray pixels in [0, 1], T at least 1.
        """
        num_frames, before = len(self.mean_KD), len(self.mean_KD) // 2
        frames_TD = normalize_frames(frames_TD, self.normalize)
        padded = np.pad(frames_TD, ((before, num_frames - 1 - before), (0, 0)), mode="edge")
        projected_TE = np.zeros((len(frames_TD), self.components_KDE.shape[2]), np.float32)
        for place, (mean_D, components_DE) in enumerate(zip(self.mean_KD, self.components_KDE, strict=True)):
            projected_TE += (padded[place : place + len(frames_TD)] - mean_D) @ components_DE
        return projected_TE


def gray_pixels(frames_THW: Array) -> Floats:
    """Return gray images as one vector of pixels in [0, 1] each, (T, D) float32."""
    frames: Floats = np.asarray(frames_THW.reshape(len(frames_THW), -1), np.float32) / np.float32(255)
    return frames


def normalize_frames(frames_TD: Array, normalize: Normalization) -> Floats:
    """Return the frames of one video as float32, normalized; a video of one still frame becomes zeros."""
    frames: Floats = np.asarray(frames_TD, np.float32)
    if normalize == "none":
        return frames
    frames = frames - frames.mean(axis=0)
    deviation = float(np.sqrt(np.mean(np.square(frames), dtype=np.float64)))
    return frames / np.float32(deviation) if deviation > _MIN_DEVIATION else np.zeros_like(frames)


def stack_frames(frames_TD: Floats, num_frames: int, steps: slice) -> Floats:
    """Return the stacks around some frames of a video, one row each: (B, K × D)."""
    around = np.arange(len(frames_TD))[steps, None] + np.arange(num_frames) - num_frames // 2
    stacked: Floats = frames_TD[around.clip(0, len(frames_TD) - 1)].reshape(len(around), -1)
    return stacked


def open_stacks(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder of a file of weights. It has no options: the file says all."""
    check_options(spec, ())
    check_modality(spec, modality, "video")
    torch_device(settings.device)  # a device that does not exist is a mistake, though NumPy computes this
    if settings.precision != "float32":
        raise SettingError(f"precision: stacks cannot be computed in {settings.precision}; expected float32")
    weights = StackWeights.load(expand_home(spec.model))
    return StackEncoder(weights, model=spec.model_name, batch_size=settings.batch_size or 8)


class StackEncoder:
    """A video encoder: `states` per frame at the rate of its weights, and their `mean`."""

    modality: Modality = "video"

    def __init__(self, weights: StackWeights, *, model: str, batch_size: int) -> None:
        self._weights, self.batch_size = weights, batch_size
        self._frames = FrameEncoder(Pixels(weights.size, batch_size=batch_size), weights.rate_hz)
        width = weights.components_KDE.shape[2]
        self.features: Mapping[str, ItemShape] = {"mean": (width,), "states": (-1, width)}
        self.axes: Mapping[str, Axis] = {"states": self._frames.axes["pixels"]}
        self.fingerprint = Fingerprint(
            family="stacks",
            model=model,
            weights=weights.digest,
            preprocessing={
                **self._frames.fingerprint.preprocessing,
                "normalize": weights.normalize,
                "stack": len(weights.mean_KD),
                "beyond the ends": "first and last frame",
            },
            pooling={"mean": "mean over states", "states": "whitened principal components of the stack of each frame"},
            backend="numpy",
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Sample and shrink the frames of each video: (T, H, W) uint8, one gray image per step."""
        return self._frames.prepare(items)

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Project the stacks of each video."""
        check_names(names, self.features)
        states: list[Array] = [self._weights.project(gray_pixels(frames)) for frames in prepared]
        outputs = {"mean": [states_TE.mean(axis=0) for states_TE in states], "states": states}
        return {name: outputs[name] for name in names}
