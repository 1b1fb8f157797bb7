"""A run as a model of mteb, which encodes what a task has; mteb's own `CachedEmbeddingWrapper` caches its vectors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Floats
from embedcache.devices import AUTO
from embedcache.errors import DataError
from embedcache.files import AnyPath
from embedcache.inference import Model, load
from embedcache.registry import require


def load_mteb(run: AnyPath, *, device: str = AUTO) -> "MtebModel":
    """Open a run as a model of mteb: it encodes what a task has with the run's encoders and projectors.

    Raises the errors of `embedcache.load`, and `MissingExtraError` if mteb is not installed.
    """
    model = load(run, device=device)
    meta = require("mteb.models.model_meta", package="mteb")
    about = {
        "name": f"embedcache/{Path(run).resolve().name}",
        "revision": model.config.weights_digest[:40] or None,
        "modalities": list(model.config.modalities),
        "embed_dim": model.width,
        "similarity_fn_name": meta.ScoringFunction.COSINE,
    }
    return MtebModel(model, meta.ModelMeta.create_empty(about))


class MtebModel:
    """A trained pair with the methods that mteb calls; create it with `load_mteb`."""

    def __init__(self, model: Model, meta: Any) -> None:
        self.model, self.mteb_model_meta = model, meta

    def encode(self, inputs: Any, **_: Any) -> Floats:
        """Embed the items of a data loader of mteb, images or texts: (N, P) float32, rows of length 1.

        Raises `DataError` for items of both modalities, or of another one.
        """
        parts = [np.empty((0, self.model.width), np.float32)]
        for batch in inputs:
            given = [name for name in ("image", "text", "audio", "video") if name in batch]
            if given not in (["image"], ["text"]):
                raise DataError(f"mteb: expected items with an image or a text, got {' and '.join(given) or 'neither'}")
            encode = self.model.encode_image if given == ["image"] else self.model.encode_text
            parts.append(encode(list(batch[given[0]])))
        return np.concatenate(parts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosine of each of N embeddings with each of Q: (N, Q)."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosines of corresponding embeddings: (N,)."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)


def _unit(embeddings: Any) -> torch.Tensor:
    values = torch.as_tensor(np.atleast_2d(np.asarray(embeddings, np.float32)))
    return torch.nn.functional.normalize(values, dim=-1)
