"""One side of a run, opened: raw items in, vectors of the shared space out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Array, Floats, blocks
from embedcache.artifact import check_same
from embedcache.cache.side import inputs_of
from embedcache.encoders.contract import Encoder, Modality
from embedcache.encoders.open import feature_names, open_again
from embedcache.extract.views import open_view
from embedcache.projectors.pair import AnyTower
from embedcache.projectors.saved import Side, project


@dataclass(frozen=True, kw_only=True)
class OpenSide:
    """One side of a run, from raw items to the shared space.

    Args:
        encoder: the frozen one.
        look: the view that it saw items by.
        names: the features that are projected.
        tower: the projector.
        device: where both run.
    """

    encoder: Encoder
    look: Callable[[Any], Any]
    names: Sequence[str]
    tower: AnyTower
    device: str

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Turn raw items into the encoder's inputs."""
        return self.encoder.prepare([self.look(item) for item in items])

    def embed(self, prepared: Sequence[Array]) -> Floats:
        """Encode and project: (B, P) float32, rows of length 1."""
        parts = [np.empty((0, self.tower.output_width), np.float32)]
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for block in blocks(len(prepared), self.encoder.batch_size):
                encoded = self.encoder.encode(prepared[block], self.names)
                inputs = inputs_of([encoded[name] for name in self.names])
                parts.append(project(self.tower, inputs, device=self.device))
        return np.concatenate(parts)


def open_side(modality: Modality, side: Side, tower: AnyTower, device: str) -> OpenSide:
    """Open the encoder that a side of a run was trained on.

    Raises:
        EmbedcacheError: what `open_again` raises.
        FingerprintError: the view is another than at the extraction.
    """
    encoder = open_again(
        side.spec, modality=modality, feature=side.feature, fingerprint=side.fingerprint, device=device
    )
    names = feature_names(side.feature)
    return OpenSide(encoder=encoder, look=_open_look(side), names=names, tower=tower, device=device)


def _open_look(side: Side) -> Callable[[Any], Any]:
    about = side.fingerprint.get("view")
    if about is None:
        return lambda item: item
    view = open_view(about["name"])
    next_step = "bring back the function as it was, or extract again"
    check_same(f"the view of feature {side.feature}", about, view.about, next_step=next_step)
    return view.look
