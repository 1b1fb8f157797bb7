"""`open_clip:ViT-B-32,pretrained=/path.pt`: one tower of a CLIP model, not normalized."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch.nn.functional import pad

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.models import (
    PixelScale,
    PixelTransform,
    Tokenizer,
    build_image_encoder,
    build_text_encoder,
    split_transform,
)
from embedcache.encoders.open import EncoderSpec, check_options
from embedcache.encoders.weights import (
    check_weights_file,
    hash_weights,
    translate_hub_errors,
)
from embedcache.errors import ArtifactError, CorruptError, SettingError, one_line
from embedcache.files import expand_home
from embedcache.registry import require, unknown_name

_USE_FILE = "give the path of a file as pretrained="
POOLING = {"pooled": "the tower's output in the joint space, before normalisation"}


def open_open_clip(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open one tower of a CLIP model. Required option: `pretrained`, a published tag or the path of a local file."""
    check_options(spec, ("pretrained",))

    open_clip = require("open_clip", extra="open-clip")
    if spec.model not in open_clip.list_models():
        raise unknown_name("open_clip model", spec.model, open_clip.list_models())

    pretrained = _pretrained(open_clip, spec)

    # The time of the last change is part of the key, so that a replaced file is loaded again.
    path = Path(pretrained)
    changed_ns = path.stat().st_mtime_ns if path.is_file() else None
    model, preprocess, weights = _load_once(spec.model, pretrained, changed_ns, settings.device)
    fingerprint = spec.fingerprint(weights=weights, pooling=POOLING)

    if modality == "image":
        pixels = pixel_transform(preprocess, dict(open_clip.get_model_preprocess_cfg(model)))
        return build_image_encoder(_ImageTower(model), pixels, fingerprint, settings)

    with translate_hub_errors(
        f"the tokenizer of {spec.model}", next_step="choose a model with open_clip's own tokenizer"
    ):
        encode = open_clip.get_tokenizer(spec.model)

    num_tokens = int(encode.context_length)
    tokenizer = Tokenizer(encode=lambda texts: encode(texts).tolist(), max_tokens=num_tokens, pad_id=0)

    fingerprint = replace(fingerprint, preprocessing={"num_tokens": num_tokens})
    return build_text_encoder(_TextTower(model, num_tokens), tokenizer, fingerprint, settings)


class _ImageTower(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": self._model.encode_image(images)}


class _TextTower(torch.nn.Module):
    """The text tower of a model, whose texts have one length; its tokenizer pads them in the model's own way."""

    def __init__(self, model: Any, num_tokens: int) -> None:
        super().__init__()
        self._model = model
        self._num_tokens = num_tokens

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        del attention_mask
        return {"pooled": self._model.encode_text(pad(input_ids, (0, self._num_tokens - input_ids.shape[1])))}


@lru_cache(maxsize=1)  # for the second tower; per device, because a module is on one device only
def _load_once(name: str, pretrained: str, _changed_ns: int | None, _device: str) -> tuple[Any, Any, str]:
    """Load a model; return it with its evaluation transform and the digest of its weights."""
    import open_clip

    try:
        with translate_hub_errors(f"{name} {pretrained}", next_step=_USE_FILE):
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    except (UnpicklingError, SafetensorError) as error:
        raise CorruptError(f"cannot read {pretrained} as weights; save the model's state_dict()") from error
    except (RuntimeError, AssertionError) as error:  # open_clip asserts some of the shapes
        raise ArtifactError(f"the weights {pretrained} do not fit {name}: {one_line(error)}") from error
    return model.eval(), preprocess, hash_weights(model.state_dict())


def _pretrained(open_clip: Any, spec: EncoderSpec) -> str:
    tags = open_clip.list_pretrained_tags_by_model(spec.model)
    if "pretrained" not in spec.options:
        expected = f"the path of a local file or one of: {', '.join(tags) or 'none is published'}"
        raise SettingError(f"{spec.text}: expected the option pretrained=, {expected}")

    pretrained = spec.options["pretrained"]
    if pretrained in tags:
        return pretrained

    path = expand_home(pretrained)
    if not path.exists() and "/" not in pretrained and not path.suffix:
        raise unknown_name("published weights", pretrained, tags, where=f"of {spec.model}")
    check_weights_file(path)
    return str(path)


def pixel_transform(preprocess: Any, published: Mapping[str, Any]) -> PixelTransform:
    """Return a model's evaluation transform up to uint8, and the normalization that follows."""

    def whole(image: Image) -> Array:
        array: Array = preprocess(image).numpy()
        return array

    def to_pixels(image: Image) -> Array:
        for step in preprocess.transforms[:-2]:  # the last two convert to a tensor in [0, 1] and normalize it
            image = step(image)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    return split_transform(whole, to_pixels, PixelScale(published["mean"], published["std"], divisor=255), published)
