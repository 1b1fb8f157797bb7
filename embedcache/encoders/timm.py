"""`timm:vit_small_patch14_dinov2.lvd142m`: any image model of timm, from the hub or, with `weights=`, from a file.

Transformers have the features `cls`, `patch_mean` and `patches`; networks that end in a map have `patch_mean` and
`patches`, the map's positions row by row. A model that pools in its own way (attention, or a norm after the mean) also
has `pooled`, which is the default. Register and distillation tokens belong to none of them. `layerN.` counts the blocks
of a transformer, and timm's feature levels (`model.feature_info`) of other networks: stages, or stem and stages.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.image import (
    PixelScale,
    PixelTransform,
    build_image_encoder,
    split_transform,
)
from embedcache.encoders.image_features import TimmFeatures, requested_layers
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.weights import find_hub_commit, hash_weights, read_weights, translate_hub_errors
from embedcache.errors import ArtifactError, EmbedcacheError, SettingError, one_line
from embedcache.registry import unknown_name

POOLING: Mapping[str, str] = {
    "pooled": "the model's own pooled output before its classifier",
    "cls": "the class token after the last norm",
    "patch_mean": "mean over the patch tokens, or over the positions of the last map",
    "patches": "the patch tokens, or the positions of the last map, row by row",
}
HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def open_timm(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open an image model.

    Options: `weights`, a local .safetensors or .pth file instead of the hub's; `image_size`, in pixels, instead of the
    published size: position embeddings are resized to it; `fit=whole`, which resizes both sides to the model's instead
    of cropping.
    """
    check_options(spec, ("fit", "image_size", "weights"))
    is_whole = spec.choice("fit", ("crop", "whole")) == "whole"
    check_modality(spec, modality, "image")
    size_px = spec.int_option("image_size")
    model, revision = load_model(spec)
    fix_padding(model)
    try:
        if size_px is not None and hasattr(model, "set_input_size"):  # networks without it accept any size
            model.set_input_size(img_size=(size_px, size_px))
        pixels = pixel_transform(model, size_px, is_whole=is_whole)
        return build_image_encoder(
            TimmFeatures(model, requested_layers(settings.features)),
            pixels,
            spec.fingerprint(weights=hash_weights(model.state_dict()), pooling=POOLING, revision=revision),
            settings,
            config={"timm": version("timm")},
            is_whole=is_whole,
        )
    except (RuntimeError, AssertionError, ValueError) as error:
        if size_px is None or isinstance(error, EmbedcacheError):
            raise
        raise SettingError(
            f"{spec.model} does not support image_size={size_px}: {one_line(error)}; try a multiple of its patch size"
        ) from error


def load_model(spec: EncoderSpec) -> tuple[Any, str | None]:
    """Load a model without its classifier, at its published size; return it and its commit on the hub, if any."""
    if not spec.model.startswith(HUB_PREFIXES):
        _check_name(spec.model, has_file=spec.weights is not None)
    return _load_published(spec.model) if spec.weights is None else (_load_file(spec.model, spec.weights), None)


def create_model(name: str, *, num_classes: int = 0) -> Any:
    """Create a model with random weights, without its classifier or with one of so many classes."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=num_classes).eval()


def fix_padding(model: Any) -> None:
    """Fix the "same" padding of a network's convolutions to that of the first images that it gets.

    Otherwise it is computed for each batch, also by an exported graph: a quarter fewer images/s on a CPU.
    """
    from timm.layers import Conv2dSame, get_same_padding

    def fix(conv: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        # with value=None, onnxruntime does not join the padding and the convolution
        sizes = zip(inputs[0].shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        height_px, width_px = (int(get_same_padding(*size)) for size in sizes)
        left_px, top_px = width_px // 2, height_px // 2
        pads = (left_px, width_px - left_px, top_px, height_px - top_px)
        conv.forward = lambda images: conv._conv_forward(pad(images, pads, value=0.0), conv.weight, conv.bias)
        hooks.pop(conv).remove()

    hooks = {conv: conv.register_forward_pre_hook(fix) for conv in model.modules() if isinstance(conv, Conv2dSame)}


def pixel_transform(model: Any, size_px: int | None = None, *, is_whole: bool = False) -> PixelTransform:
    """Return a model's published transform.

    Args:
        model: a model of timm.
        size_px: side of the input in pixels; None: the published one.
        is_whole: whether images are resized to the input size without a crop, which the settings then say.
    """
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model, args={} if size_px is None else {"img_size": size_px})
    fit = {"fit": "whole"} if is_whole else {}
    if is_whole:
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    whole, to_pixels = (create_transform(**config, is_training=False, normalize=flag) for flag in (True, False))
    return split_transform(
        lambda image: whole(image).numpy(),
        lambda image: to_pixels(image).numpy(),
        PixelScale(config["mean"], config["std"], divisor=255),
        {**config, **fit},
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


def _load_published(name: str) -> tuple[Any, str | None]:
    import timm

    is_on_hub = name.startswith(HUB_PREFIXES)
    repository = name.partition(":")[2] if is_on_hub else timm.get_pretrained_cfg(name).hf_hub_id
    next_step = f"give a file: timm:{name},weights=PATH"
    revision = find_hub_commit(repository, model=name, next_step=next_step) if repository else None
    with translate_hub_errors(name, next_step=next_step):
        return timm.create_model(name, pretrained=True, num_classes=0).eval(), revision


def _load_file(name: str, path: Path) -> Any:
    import timm

    model = create_model(name)
    state = read_weights(path)
    heads = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    try:
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith(prefixes)})
        return model
    except RuntimeError:
        pass
    # The file replaces timm's download, so that timm renames the weights of older checkpoints. With the classifier,
    # timm insists that every weight fits; without it, timm would leave the others random.
    source = {"file": str(path)}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"the weights in {path} do not fit {name}: {one_line(error)}; name the model that they belong to"
        ) from error
    model.reset_classifier(0)
    return model.eval()
