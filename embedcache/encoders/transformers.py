"""`hf:facebook/dinov2-base` or `hf:/local/folder`: image and text models of transformers, with their own processor."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, new

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.image import (
    ImageModel,
    PixelScale,
    Transform,
    build_image_encoder,
    plain_json,
    split_transform,
)
from embedcache.encoders.image_features import ImageFeatures, requested_layers, untie_last_state
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import build_text_encoder, open_tokenizer
from embedcache.encoders.text_features import POOLING as TEXT_POOLING
from embedcache.encoders.text_features import TextFeatures
from embedcache.encoders.weights import find_model_class, find_model_folder, load_config, load_pretrained, one_line
from embedcache.errors import PathError, SettingError
from embedcache.provenance import digest

IMAGE_POOLING: Mapping[str, str] = {
    "pooled": "the model's own pooled output",
    "cls": "last state of the class token",
    "patch_mean": "mean over the patch tokens, or over the positions of the last map",
    "patches": "last states of the patch tokens, or the positions of the last map, row by row",
}


def open_transformers(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open an image or text model. Options: `revision` (of a hub model), for texts also `max_tokens`.

    Of a model of both modalities, such as CLIP, the requested tower is opened.
    """
    check_options(spec, ("revision",) if modality == "image" else ("max_tokens", "revision"))
    folder = find_model_folder(spec)
    config, loader = find_tower(folder.path, modality)
    is_vision = hasattr(config, "num_channels") and not hasattr(config, "vocab_size")
    check_modality(spec, modality, "image" if is_vision else "text")
    model, weights = load_pretrained(loader, folder.path, config)
    layers = requested_layers(settings.features)
    untie_last_state(model, layers)
    fingerprint = Fingerprint(
        family="hf",
        model=spec.model_name,
        revision=folder.revision,
        weights=weights,
        preprocessing={},
        pooling=IMAGE_POOLING if modality == "image" else TEXT_POOLING,
    )
    if modality == "image":
        transform, scale, published, input_size = pixel_transform(folder.path)
        module = ImageModel(ImageFeatures(model, layers), scale, input_size=input_size, requested=settings.features)
        fingerprint = replace(fingerprint, preprocessing=published)
        return build_image_encoder(module, transform, fingerprint=fingerprint, settings=settings)
    model_config: Any = model.config
    tokenizer = open_tokenizer(folder.path, max_tokens=spec.int_option("max_tokens"), model=model)
    return build_text_encoder(
        TextFeatures(model, layers),
        tokenizer,
        fingerprint=replace(fingerprint, preprocessing=tokenizer.preprocessing),
        settings=settings,
        onnx_key={"name": f"hf-{spec.folder}", "config": digest(model_config.to_dict())},
    )


def find_tower(folder: Path, modality: Modality) -> tuple[Any, Any]:
    """Return the config of a folder's model, or of its tower of a modality, and the class that loads it."""
    import transformers

    config = load_config(folder)
    part = getattr(config, "vision_config" if modality == "image" else "text_config", None)
    if part is None:
        return config, find_model_class(config, folder)
    if type(part) not in transformers.MODEL_MAPPING:
        raise SettingError(
            f"{folder} is a {config.model_type}, whose {modality} tower transformers cannot load alone; choose another "
            "model"
        )
    return part, transformers.AutoModel


def pixel_transform(folder: Path) -> tuple[Transform, torch.nn.Module, dict[str, Any], tuple[int, ...]]:
    """Return the transform up to uint8, the normalization that follows, the published settings, and (3, H, W)."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise PathError(f"no image processor in {folder}: {one_line(error)}; add preprocessor_config.json") from error

    def whole(image: Image) -> Array:
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    def to_pixels(image: Image) -> Array:
        pixels = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(pixels[0])

    published = {name: value for name, value in processor.to_dict().items() if not name.startswith("_")}
    shapes = {whole(new("RGB", size)).shape for size in ((320, 200), (200, 320))}
    if len(shapes) != 1:
        raise SettingError(
            f"the image processor in {folder} returns a different shape per image, {sorted(shapes)}, and a batch needs "
            "one: set do_center_crop, or a size with height and width, in preprocessor_config.json"
        )
    transform, scale = split_transform(whole, to_pixels, _pixel_scale(published))
    return transform, scale, plain_json(published), shapes.pop()


def _pixel_scale(published: Mapping[str, Any]) -> PixelScale:
    # The library's processors scale mean and std to the range of the pixels, not the pixels to [0, 1].
    pixel_range = 1.0 / published["rescale_factor"] if published.get("do_rescale") else 1.0
    is_normalized = published.get("do_normalize")
    mean, std = (published["image_mean"], published["image_std"]) if is_normalized else ([0.0] * 3, [1.0] * 3)
    return PixelScale(*(torch.tensor(values) * pixel_range for values in (mean, std)))
