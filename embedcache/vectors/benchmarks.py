"""A run as a model of CLIP_benchmark, which `register` adds to it, and of mteb, which `load_mteb` opens.

mteb's own `CachedEmbeddingWrapper` caches the vectors.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from embedcache.arrays import Array, Floats
from embedcache.dataset.raw_items import prepare_item
from embedcache.errors import DataError
from embedcache.files import AnyPath
from embedcache.inference import Model, ProjectedEncoder, load, open_projected_encoder
from embedcache.processes import AUTO, torch_device
from embedcache.registry import require
from embedcache.reports.render import MODEL
from embedcache.runs import PAIR, Run


class _Tokens(list[Array]):
    """Token ids of several captions of different lengths, in place of the tensor that CLIP_benchmark passes on."""

    def to(self, _: Any) -> "_Tokens":
        """Return the same object, because encoders take their input from the CPU."""
        return self


class _RunModel:
    """A run with both of its frozen encoders and the methods that CLIP_benchmark calls.

    Vectors are float32 under autocast too; the precision is that of the features that the run was trained on.
    """

    def __init__(self, image: ProjectedEncoder, text: ProjectedEncoder, device: str) -> None:
        self._image = image
        self._text = text
        self._device = device

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images prepared by `transform`: (B, 3, H, W) -> (B, P) float32, rows of length 1."""
        return self._on_device(self._image.embed(list(images.cpu().numpy())))

    def encode_text(self, tokens: _Tokens) -> Tensor:
        """Encode texts prepared by `tokenizer`: (B, P) float32, rows of length 1."""
        return self._on_device(self._text.embed(tokens))

    def eval(self) -> "_RunModel":
        """Return the model itself, which is never in training mode."""
        return self

    def to(self, _: Any) -> "_RunModel":
        """Return the model itself, which stays on the device that it was loaded on."""
        return self

    def _on_device(self, vectors_BP: Floats) -> Tensor:
        return torch.from_numpy(vectors_BP).to(self._device)


def load_clip_benchmark(
    model_name: str, pretrained: str | Path, cache_dir: str | None = None, device: str | torch.device = AUTO
) -> tuple[_RunModel, Callable[[Image], Tensor], Callable[[Sequence[str]], _Tokens]]:
    """Load a run as CLIP_benchmark loads a model: (model, transform, tokenizer).

    `transform` prepares one PIL image of any mode as in extraction, including transparency and EXIF orientation, and
    returns (3, H, W) uint8 or float32. An encoder that ran on onnxruntime stays on the CPU.

    Args:
        model_name: unused; CLIP_benchmark writes it into its results.
        pretrained: folder of the run.
        cache_dir: unused, because the run names its encoders.
        device: device of the encoders and projectors.

    Raises:
        PathError: the folder is not a finished run.
        FingerprintError: an installed encoder differs from the one whose features the run was trained on.
        SettingError: the device does not exist.
    """
    del model_name, cache_dir

    device = str(torch_device(str(device)))
    run = Run.open(pretrained, kind=PAIR, device=device)
    image = open_projected_encoder("image", run)
    text = open_projected_encoder("text", run)
    return (
        _RunModel(image, text, device),
        lambda pil_image: torch.from_numpy(prepare_item(pil_image, "image", image.source)),
        lambda texts: _Tokens(text.prepare(texts)),
    )


def register() -> None:
    """Register `embedcache` as a model type of CLIP_benchmark in this process.

    Its accuracy is replaced, because release 1.6.2 converts an array of one number to float, which NumPy refuses from
    version 2.4 on (its issue 147).
    """
    models = require("clip_benchmark.models", package="clip-benchmark")
    models.TYPE2FUNC[MODEL] = load_clip_benchmark
    # A second registration in the same process changes nothing.
    if MODEL not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL)

    for name in ("zeroshot_classification", "linear_probe"):
        vars(require(f"clip_benchmark.metrics.{name}", package="clip-benchmark"))["accuracy"] = top_k_accuracy


def top_k_accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Return the top-k accuracy for each k of (N, C) scores and (N,) classes."""
    is_hit_NK = output.topk(max(topk), dim=1).indices == target[:, None]
    return [is_hit_NK[:, :k].any(dim=1).double().mean().item() for k in topk]


def load_mteb(run: AnyPath, *, device: str = AUTO) -> "MtebModel":
    """Open a run as a model of mteb, which encodes the items of a task with the run's encoders and projectors.

    Raises the errors of `embedcache.load`, and `MissingExtraError` if mteb is not installed.
    """
    model = load(run, device=device)
    meta = require("mteb.models.model_meta", package="mteb")
    about = {
        "name": f"embedcache/{Path(run).resolve().name}",
        "revision": model.run.info.weights[:40] or None,
        "modalities": list(model.run.modalities),
        "embed_dim": model.width,
        "similarity_fn_name": meta.ScoringFunction.COSINE,
    }
    return MtebModel(model, meta.ModelMeta.create_empty(about))


class MtebModel:
    """A trained pair with the methods that mteb calls; create it with `load_mteb`."""

    def __init__(self, model: Model, meta: Any) -> None:
        self.model = model
        self.mteb_model_meta = meta

    def encode(self, inputs: Any, **_: Any) -> Floats:
        """Embed the items of a data loader of mteb, images or texts: (N, P) float32, rows of length 1.

        Raises `DataError` for items of both modalities, or of another one.
        """
        # A task without items has an empty array of the right width.
        parts = [np.empty((0, self.model.width), np.float32)]
        for batch in inputs:
            modalities = [name for name in ("image", "text", "audio", "video") if name in batch]
            if modalities not in (["image"], ["text"]):
                items = " and ".join(modalities) or "neither"
                raise DataError(f"mteb: expected items with an image or a text, got {items}")
            encode = self.model.encode_image if modalities == ["image"] else self.model.encode_text
            parts.append(encode(list(batch[modalities[0]])))
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
