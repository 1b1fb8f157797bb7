"""`open_clip:ViT-B-32,pretrained=/path.pt`: one tower of a CLIP, its joint-space output unnormalised."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError

from embedcache.arrays import Floats, Ints
from embedcache.encoders.contract import Encoder, EncoderSettings, Fingerprint, ItemShape, Modality
from embedcache.encoders.graph import torch_graph
from embedcache.encoders.hub import hub_commit, hub_errors
from embedcache.encoders.image import ImageEncoder, plain_json
from embedcache.encoders.open import EncoderSpec, check_options
from embedcache.encoders.text import TextEncoder
from embedcache.encoders.weights import check_file, hash_weights
from embedcache.errors import ArtifactError, CorruptError, SettingError
from embedcache.registry import require, unknown_name

POOLING = {"pooled": "the tower's output in the joint space, before normalisation"}


def open_open_clip(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open one tower of a CLIP. Option, always needed: `pretrained`, a published tag or the path of a local file.

    Raises:
        MissingExtraError: open_clip is not installed.
        UnknownNameError: no such model, tag or option.
        PathError: no such file, or no hub to get the weights from.
        ArtifactError: weights that are another model's.
        SettingError: no `pretrained`, or onnxruntime was asked for.
    """
    check_options(spec, ("pretrained",))
    open_clip = require("open_clip", extra="open-clip")
    if spec.model not in open_clip.list_models():
        raise unknown_name("open_clip model", spec.model, open_clip.list_models())
    model, preprocess = _load(open_clip, spec)
    open_tower = _open_image if modality == "image" else _open_text
    return open_tower(open_clip, spec, model, preprocess, settings)


class _ImageTower(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": self._model.encode_image(images)}


class _TextTower(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        # open_clip finds the end of a text by its tokens: the highest id, or the padding.
        del attention_mask
        return {"pooled": self._model.encode_text(input_ids)}


def _load(open_clip: Any, spec: EncoderSpec) -> tuple[Any, Any]:
    pretrained = _pretrained(open_clip, spec)
    try:
        with hub_errors(f"{spec.model} {pretrained}", instead="give the path of a file as pretrained="):
            model, _, preprocess = open_clip.create_model_and_transforms(spec.model, pretrained=pretrained)
    except (UnpicklingError, SafetensorError) as error:
        raise CorruptError(f"{pretrained} can't be read as weights; save the model's state_dict()") from error
    except (RuntimeError, AssertionError) as error:  # open_clip asserts some of the shapes
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"the weights {pretrained} do not fit {spec.model}: {reason}; name the model that made them"
        ) from error
    return model.eval(), preprocess


def _pretrained(open_clip: Any, spec: EncoderSpec) -> str:
    tags = open_clip.list_pretrained_tags_by_model(spec.model)
    if "pretrained" not in spec.options:
        raise SettingError(
            f"{spec.text} names no weights; add the option pretrained=: the path of a local file, "
            f"or one of: {', '.join(tags) or 'none is published'}"
        )
    pretrained = spec.options["pretrained"]
    if pretrained in tags:
        _check_published(open_clip, spec.model, pretrained)
        return pretrained
    path = Path(pretrained).expanduser()
    if not path.exists() and "/" not in pretrained and not path.suffix:
        raise unknown_name(f"published weights of {spec.model}", pretrained, tags)
    check_file(path)
    return str(path)


def _check_published(open_clip: Any, model: str, tag: str) -> None:
    owner, _, rest = open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").partition("/")
    if owner:
        repository = f"{owner}/{rest.partition('/')[0]}"
        hub_commit(repository, what=f"{model} {tag}", instead="give the path of a file as pretrained=")


def _open_image(
    open_clip: Any, spec: EncoderSpec, model: Any, preprocess: Any, settings: EncoderSettings
) -> ImageEncoder:
    def transform(image: Image) -> Floats:
        array: Floats = np.asarray(preprocess(image).numpy(), dtype=np.float32)
        return array

    published = open_clip.get_model_preprocess_cfg(model)
    return ImageEncoder(
        graph=torch_graph(_ImageTower(model), settings, "open_clip"),
        transform=transform,
        features=_features(open_clip, spec),
        fingerprint=_fingerprint(spec, model, dict(published), settings),
    )


def _open_text(
    open_clip: Any, spec: EncoderSpec, model: Any, preprocess: Any, settings: EncoderSettings
) -> TextEncoder:
    del preprocess
    with hub_errors(f"the tokenizer of {spec.model}", instead="choose a model with open_clip's own tokenizer"):
        tokenizer = open_clip.get_tokenizer(spec.model)
    num_tokens = int(tokenizer.context_length)

    def tokenize(texts: Sequence[str]) -> list[Ints]:
        return list(tokenizer(list(texts)).numpy().astype(np.int64))

    return TextEncoder(
        graph=torch_graph(_TextTower(model), settings, "open_clip"),
        tokenize=tokenize,
        features=_features(open_clip, spec),
        fingerprint=_fingerprint(spec, model, {"num_tokens": num_tokens}, settings),
        pad_id=0,
        length=num_tokens,
    )


def _features(open_clip: Any, spec: EncoderSpec) -> dict[str, ItemShape]:
    return {"pooled": (int(open_clip.get_model_config(spec.model)["embed_dim"]),)}


def _fingerprint(
    spec: EncoderSpec, model: Any, preprocessing: dict[str, Any], settings: EncoderSettings
) -> Fingerprint:
    return Fingerprint(
        family="open_clip",
        model=spec.model,
        revision=None,
        weights=hash_weights(model.state_dict()),
        preprocessing=plain_json(preprocessing),
        pooling=POOLING,
        precision=settings.precision,
    )
