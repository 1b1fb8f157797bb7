"""A video encoder, `pipelines.avsr.stacks:open_stacks:/path/FILE`: principal components of consecutive gray frames.

A stack is a frame with its two neighbors on each side, so that one vector describes motion. `fit_stacks`
fits the mean and the whitened components in the file to unlabeled videos. The encoder is made for videos of a mouth or
a face that fills the frame: it describes the whole frame, and searches for nothing in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from embedcache.arrays import Array, Floats, blocks
from embedcache.derive.rules import principal_components
from embedcache.encoders.base import Encoder, EncoderSettings, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.frames import RATE_HZ, FrameEncoder, RawVideo
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.weights import check_weights_file, hash_weights
from embedcache.errors import CorruptError, DataError, SettingError, one_line
from embedcache.files import expand_home, replacing
from embedcache.projectors.base import Moments
from embedcache.store.layout import Axis
from pipelines.avsr.pixels import PIXELS_SIZE, Pixels

FAMILY = "pipelines.avsr.stacks:open_stacks"

_MIN_DEVIATION = 1e-6  # below it, all frames of a video count as the same
_STACKS_PER_BLOCK = 2_048


@dataclass(frozen=True, kw_only=True, eq=False)
class StackWeights:
    """Weights of the encoder: mean and principal components of stacked gray frames.

    Args:
        mean_KD: (K, D) float32, mean of the stacks of K frames of D pixels.
        components_KDE: (K, D, E) float32, the components, each divided by its standard deviation.
    """

    mean_KD: Floats
    components_KDE: Floats

    def save(self, path: Path) -> None:
        """Write a `.safetensors` file, atomically."""
        with replacing(path) as temporary:
            save_file(self.tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> "StackWeights":
        """Read a file that `save` wrote.

        Raises:
            PathError: it does not exist.
            CorruptError: it is not such a file.
        """
        check_weights_file(path)
        try:
            tensors = load_file(path)
            weights = cls(mean_KD=tensors["mean"], components_KDE=tensors["components"])
        except (SafetensorError, KeyError, OSError) as error:
            raise CorruptError(f"cannot read {path} as weights of stacks: {one_line(error)}; fit it again") from error
        if weights.mean_KD.shape[1:] != (PIXELS_SIZE[0] * PIXELS_SIZE[1],):
            raise CorruptError(
                f"{path}: expected frames of {PIXELS_SIZE[0]} x {PIXELS_SIZE[1]}, got others; fit it again"
            )
        return weights

    @property
    def tensors(self) -> dict[str, Array]:
        """The content of the file."""
        return {
            "mean": np.ascontiguousarray(self.mean_KD, np.float32),
            "components": np.ascontiguousarray(self.components_KDE, np.float32),
        }

    def project(self, frames_TD: Floats) -> Floats:
        """Project the stack around each frame, (T, E) float32. Beyond its ends, a video repeats its last frame.

        Args:
            frames_TD: (T, D) gray pixels in [0, 1], T at least 1.
        """
        num_frames = len(self.mean_KD)
        margin = num_frames // 2
        frames_TD = normalize_frames(frames_TD)
        padded = np.pad(frames_TD, ((margin, num_frames - 1 - margin), (0, 0)), mode="edge")

        # One product for each place in the stack, so that the stacks are never in memory.
        projected_TE = np.zeros((len(frames_TD), self.components_KDE.shape[2]), np.float32)
        for place, (mean_D, components_DE) in enumerate(zip(self.mean_KD, self.components_KDE, strict=True)):
            projected_TE += (padded[place : place + len(frames_TD)] - mean_D) @ components_DE
        return projected_TE


def fit_stacks(videos: Iterable[RawVideo], path: Path | str, *, width: int = 64, stack: int = 5) -> StackWeights:
    """Fit the encoder to videos and write its file; no labels are used.

    The weights are the mean and the first whitened principal components of all stacks, computed from their second
    moments in one pass. They are as exact as with all stacks in memory. Memory: one video, and 89 MB of moments for
    5 frames.

    Args:
        videos: decoded videos, read once.
        path: `.safetensors` file to write.
        width: number of components.
        stack: frames in a stack.

    Raises:
        ItemError: a video has no frames.
        DataError: the stacks of the videos have fewer directions than `width`.
    """
    frames = FrameEncoder(Pixels(PIXELS_SIZE, batch_size=1), RATE_HZ)
    num_pixels = PIXELS_SIZE[0] * PIXELS_SIZE[1]
    moments = Moments(stack * num_pixels)

    for video in videos:
        for clip in frames.prepare([video]):
            frames_TD = normalize_frames(gray_pixels(clip))

            # Stacks repeat every frame five times, so only a block of them is in memory.
            for steps in blocks(len(frames_TD), _STACKS_PER_BLOCK):
                moments.add(stack_frames(frames_TD, stack, steps))
    if moments.num_rows < 2:
        raise DataError(f"expected videos with at least 2 frames to fit stacks, got {moments.num_rows} frames")

    mean_D, components_DE = principal_components(moments, width, whiten=True)
    weights = StackWeights(
        mean_KD=mean_D.reshape(stack, -1), components_KDE=components_DE.reshape(stack, num_pixels, -1)
    )
    weights.save(Path(path))
    return weights


def gray_pixels(frames_THW: Array) -> Floats:
    """Return gray images as one vector of pixels in [0, 1] each, (T, D) float32."""
    frames: Floats = np.asarray(frames_THW.reshape(len(frames_THW), -1), np.float32) / np.float32(255)
    return frames


def normalize_frames(frames_TD: Floats) -> Floats:
    """Subtract the mean frame of a video, and divide by the standard deviation of the rest. A still video becomes 0.

    This makes videos of different people and in different light comparable.
    """
    frames_TD = frames_TD - frames_TD.mean(axis=0)
    deviation = float(np.sqrt(np.mean(np.square(frames_TD), dtype=np.float64)))
    return frames_TD / np.float32(deviation) if deviation > _MIN_DEVIATION else np.zeros_like(frames_TD)


def stack_frames(frames_TD: Floats, num_frames: int, steps: slice) -> Floats:
    """Return the stacks around some frames of a video, one row each: (B, K × D)."""
    frames_BK = np.arange(len(frames_TD))[steps, None] + np.arange(num_frames) - num_frames // 2
    stacked: Floats = frames_TD[frames_BK.clip(0, len(frames_TD) - 1)].reshape(len(frames_BK), -1)
    return stacked


def open_stacks(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder of a file of weights. It has no options, since the file has all settings."""
    check_options(spec, ())
    check_modality(spec, modality, "video")
    if settings.precision != "float32":
        raise SettingError(f"precision: stacks cannot be computed in {settings.precision}; expected float32")
    weights = StackWeights.load(expand_home(spec.model))
    return StackEncoder(weights, model=spec.model_name, batch_size=settings.batch_size or 8)


class StackEncoder:
    """A video encoder: `states` per frame at `RATE_HZ`, and their `mean`."""

    modality: Modality = "video"

    def __init__(self, weights: StackWeights, *, model: str, batch_size: int) -> None:
        self._weights = weights
        self.batch_size = batch_size
        self._frames = FrameEncoder(Pixels(PIXELS_SIZE, batch_size=batch_size), RATE_HZ)

        width = weights.components_KDE.shape[2]
        self.features: Mapping[str, ItemShape] = {"mean": (width,), "states": (-1, width)}
        self.axes: Mapping[str, Axis] = {"states": self._frames.axes["pixels"]}

        self.fingerprint = Fingerprint(
            family="stacks",
            model=model,
            weights=hash_weights({name: torch.from_numpy(tensor) for name, tensor in weights.tensors.items()}),
            preprocessing={
                **self._frames.fingerprint.preprocessing,
                "normalize": "mean and deviation of each video",
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
