"""A run's model from raw items on: both frozen encoders, opened as the run had them, and its projectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image

from embedcache.arrays import Array, Floats, blocks
from embedcache.dataset.inputs import inputs_of
from embedcache.encoders.backends import torch_device
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import feature_names, reopen_encoder
from embedcache.errors import DataError, ItemError, PathError
from embedcache.extract.views import open_view
from embedcache.projectors.pair import AlignedPair, AnyTower
from embedcache.projectors.saved import PairConfig, TowerInput, load_pair, project
from embedcache.provenance import check_same
from embedcache.sources.images import decode_image, rgb_image

ImageLike: TypeAlias = str | Path | Image
"""A picture: the path of a file, or an open `PIL.Image.Image` of any mode."""


def load(run_path: Path | str, *, device: str = "cpu") -> "Model":
    """Open a run that `train_projectors` or `embedcache train` made.

    The encoders are opened on first use: an image encoder that is never asked is never loaded.

    Args:
        run_path: the run's folder.
        device: a torch device for encoders and projectors; an encoder that ran on onnxruntime stays on the CPU.

    Raises:
        PathError: the folder is no finished run.
        CorruptError: the weights are not those that the run was finished with.
        SettingError: there is no such device.
    """
    device = str(torch_device(device))
    pair, config = load_pair(Path(run_path), device=device)
    return Model(pair, config, device=device)


class Model:
    """A trained pair with its frozen encoders: pictures and texts to vectors of one space. Made by `load`.

    Args:
        pair: the projectors, on the device.
        config: of the run.
        device: where encoders run.
    """

    def __init__(self, pair: AlignedPair, config: PairConfig, *, device: str) -> None:
        self._pair, self._device = pair, device
        self.config = config

    def __repr__(self) -> str:
        """Name both features and the width."""
        return f"Model({self.config.image.feature} + {self.config.text.feature} -> {self.width})"

    @property
    def width(self) -> int:
        """P, the width of the shared space."""
        return self.config.shared_width

    @property
    def scale(self) -> float:
        """What the training multiplied cosines by, 1 / temperature; for probabilities."""
        return self._pair.scale.item()

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Floats:
        """Embed pictures, a batch of the encoder at a time.

        EXIF orientation, transparency and other modes are treated as in extraction.

        Args:
            images: one, or N: paths and open pictures.

        Returns:
            (N, P) float32, rows of length 1; one picture is N = 1, and no picture (0, P).

        Raises:
            PathError: there is no such file.
            DataError: a picture cannot be decoded; names it.
            FingerprintError: the encoder that opens now is not the one whose features the run was trained on.
            MissingExtraError: the encoder's package is not installed.
        """
        listed = [images] if isinstance(images, str | Path | Image) else images
        return self._image_side.encode(listed, _open_picture)

    def encode_text(self, texts: str | Sequence[str]) -> Floats:
        """Embed texts, a batch of the encoder at a time.

        Args:
            texts: one, or N.

        Returns:
            (N, P) float32, rows of length 1; one text is N = 1, and no text (0, P).

        Raises:
            DataError: a text is empty.
            FingerprintError: the encoder that opens now is not the one whose features the run was trained on.
            MissingExtraError: the encoder's package is not installed.
        """
        return self._text_side.encode([texts] if isinstance(texts, str) else texts, _check_text)

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Floats:
        """Compare every picture with every text; of vectors that you have, this is `images @ texts.T`.

        Args:
            images: N, as of `encode_image`.
            texts: M, as of `encode_text`.

        Returns:
            (N, M) float32 cosines.

        Raises:
            PathError, DataError, FingerprintError, MissingExtraError: as of the two.
        """
        similarities_NM: Floats = self.encode_image(images) @ self.encode_text(texts).T
        return similarities_NM

    @cached_property
    def _image_side(self) -> "ProjectedEncoder":
        """The image encoder and its projector."""
        return open_projected_encoder("image", self.config.image, self._pair.image, self._device)

    @cached_property
    def _text_side(self) -> "ProjectedEncoder":
        """The text encoder and its projector."""
        return open_projected_encoder("text", self.config.text, self._pair.text, self._device)


@dataclass(frozen=True, kw_only=True)
class ProjectedEncoder:
    """One side of a run, from raw items to the shared space.

    Args:
        encoder: of the fingerprint that the run was trained on.
        look: the view that the feature was made with, item -> item.
        names: features that the tower takes.
        tower: the projector.
        device: its device.
    """

    encoder: Encoder
    look: Callable[[Any], Any]
    names: Sequence[str]
    tower: AnyTower
    device: str

    def encode(self, items: Sequence[Any], open_item: Callable[[Any], Any]) -> Floats:
        """Open, prepare and embed a batch at a time: (N, P) float32, rows of length 1. Memory: a batch."""
        batches = blocks(len(items), self.encoder.batch_size)
        parts = [self.embed(self.prepare([open_item(item) for item in items[block]])) for block in batches]
        return np.concatenate([np.empty((0, self.tower.output_width), np.float32), *parts])

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Turn RGB pictures or texts into the encoder's inputs, one array an item."""
        return self.encoder.prepare([self.look(item) for item in items])

    def embed(self, prepared: Sequence[Array]) -> Floats:
        """Encode and project what `prepare` gave: (B, P) float32, rows of length 1."""
        parts = [np.empty((0, self.tower.output_width), np.float32)]
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for block in blocks(len(prepared), self.encoder.batch_size):
                encoded = self.encoder.encode(prepared[block], self.names)
                inputs = inputs_of([encoded[name] for name in self.names])
                parts.append(project(self.tower, inputs, device=self.device))
        return np.concatenate(parts)


def open_projected_encoder(modality: Modality, side: TowerInput, tower: AnyTower, device: str) -> ProjectedEncoder:
    """Open the encoder of one side of a run, and the view it looked through.

    Raises:
        FingerprintError: the encoder or view that opens now is not the one that the run was trained on.
        MissingExtraError: the encoder's package is not installed.
    """
    encoder = reopen_encoder(
        side.spec, modality=modality, feature=side.feature, fingerprint=side.fingerprint, device=device
    )
    names = feature_names(side.feature)
    return ProjectedEncoder(encoder=encoder, look=_open_look(side), names=names, tower=tower, device=device)


def _open_look(side: TowerInput) -> Callable[[Any], Any]:
    about = side.fingerprint.get("view")
    if about is None:
        return lambda item: item
    view = open_view(about["name"])
    next_step = "bring back the function as it was, or extract again"
    check_same(f"the view of feature {side.feature}", about, view.about, next_step=next_step)
    return view.look


def _open_picture(image: ImageLike) -> Image:
    try:
        return rgb_image(image) if isinstance(image, Image) else decode_image(_read(Path(image)))
    except ItemError as error:
        raise DataError(f"image {image}: {error}") from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise PathError(f"image {path} is no file here; give the path of one, or an open PIL picture")
    return path.read_bytes()


def _check_text(text: str) -> str:
    if not text.strip():
        raise DataError("a text is empty; give some words")
    return text
